"""What a worker gets on top for evaluation: its runtime is watched, for recording and for the oracle's clock."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from flashmemory_vllm.capture.document import Recording
from flashmemory_vllm.capture.passes import BatchRow
from flashmemory_vllm.capture.recorder import Choices, Recorder, RecorderSettings
from flashmemory_vllm.capture.writer import ModelShape
from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.indexer.oracle import OracleSelector
from flashmemory_vllm.plugin import sizing

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase

    from flashmemory_vllm.residency.types import NewRequest, RunningRequest, StepInput
    from flashmemory_vllm.runtime.runtime import ResidencyRuntime
    from flashmemory_vllm.runtime.tables import CompactedTable


class WatchedRuntime:
    """Stands before a worker's runtime and does what that does; a subclass looks on."""

    def __init__(self, runtime: "ResidencyRuntime") -> None:
        self._runtime = runtime

    @property
    def watched(self) -> "ResidencyRuntime":
        """The runtime itself."""
        return self._runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)


class RecordedRuntime(WatchedRuntime):
    """Shows a recorder every real forward pass.

    Args:
        runtime: the worker's; one layer group at a resident ratio of 1.
        recorder: keeps what attention looked at.
    """

    def __init__(self, runtime: "ResidencyRuntime", recorder: Recorder) -> None:
        super().__init__(runtime)
        self._recorder = recorder
        self._prompt_lens: dict[str, int] = {}
        # Of requests whose prompt is followed by text, in one prefill
        self._texts: dict[str, int] = {}
        self._computed: dict[str, int] = {}
        self._scheduled: Mapping[str, int] = {}
        self._req_ids: Sequence[str] = ()

    @contextmanager
    def step(self, step_input: "StepInput") -> Iterator[None]:
        """As the runtime's."""
        if step_input.preempted:
            raise IntegrityError(f"capture: {list(step_input.preempted)} were preempted; lower --batch")
        for req_id in step_input.finished:
            self._prompt_lens.pop(req_id, None)
        self._prompt_lens |= {
            request.req_id: self._texts.pop(request.req_id, request.prefill_len) for request in step_input.new
        }
        self._computed = {request.req_id: request.num_computed_tokens for request in _scheduled(step_input)}
        self._scheduled = step_input.num_scheduled_tokens
        with self._runtime.step(step_input):
            yield
            self._recorder.end()

    def record_along(self, req_id: str, prompt_len: int) -> None:
        """Take the tokens of a request that is to begin from `prompt_len` on for text that follows its prompt."""
        self._texts[req_id] = prompt_len

    def set_batch(self, req_ids: Sequence[str], seq_lens: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """As the runtime's."""
        self._runtime.set_batch(req_ids, seq_lens, slot_mapping)
        self._req_ids = req_ids

    def compacted_tables(self, num_rows: int) -> "list[CompactedTable]":
        """As the runtime's.

        Raises:
            IntegrityError: a row does not have all its blocks on the device.
        """
        tables = self._runtime.compacted_tables(num_rows)
        rows = [
            BatchRow(req_id, self._prompt_lens[req_id], self._computed[req_id], self._scheduled[req_id], slots)
            for req_id, slots in zip(self._req_ids, tables[0].block_table, strict=False)
        ]
        for row, seq_len in zip(rows, tables[0].seq_lens_host.tolist(), strict=False):
            if row.seq_len != seq_len:
                raise IntegrityError(
                    f"capture: request {row.req_id} has {seq_len} of {row.seq_len} tokens on the device; lower --batch"
                )
        self._recorder.begin(rows)
        return tables

    def attended(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
    ) -> None:
        """As the runtime's, of a batch in one run."""
        self._runtime.attended(layer, query, key, value, output)
        if self._runtime.in_step:
            self._recorder.layer(layer, query)


class TimedRuntime(WatchedRuntime):
    """Tells the oracle how far each request has come."""

    @contextmanager
    def step(self, step_input: "StepInput") -> Iterator[None]:
        """As the runtime's."""
        future = OracleSelector.future
        assert future is not None, "an oracle was made without a future"
        for request in _scheduled(step_input):
            scheduled = step_input.num_scheduled_tokens[request.req_id]
            future.advance(request.req_id, request.num_computed_tokens + scheduled)
        with self._runtime.step(step_input):
            yield


class CaptureExtension:
    """Methods that vLLM adds to our worker, for `collective_rpc`; named as `--worker-extension-cls`."""

    def flashmemory_record(
        self: "WorkerBase", choices: Choices, anchor_layers: tuple[int, ...] | None = None
    ) -> ModelShape:
        """Record all requests from now on.

        Args:
            choices: what to keep.
            anchor_layers: layers to keep queries and keys of, ascending, counted among those of full attention.
                Default: those of the runtime.

        Returns:
            Sizes of the model.
        """
        runtime = self.flashmemory_runtime
        if isinstance(runtime, RecordedRuntime):
            runtime = runtime.watched
        anchors = anchor_layers or runtime.anchors
        layers = sizing.attention_layers(self.vllm_config, list(runtime.parts.shape.layer_names))
        shape, page_format = runtime.parts.shape, runtime.parts.kind.page_format
        caches = [layer.kv_cache for layer in layers.values()]

        def read_keys(layer: int, slots: torch.Tensor) -> torch.Tensor:
            pages, table = page_format.select(caches[layer], slots)
            keys = page_format.keys(pages)
            return keys if table is None else keys.index_select(0, table)

        settings = RecorderSettings(
            num_layers=shape.num_layers,
            num_query_heads=shape.num_query_heads,
            key_width=shape.num_kv_heads * shape.head_dim,
            anchor_layers=anchors,
            block_size=shape.block_size,
            softmax_scale=shape.softmax_scale,
            choices=choices,
        )
        self.flashmemory_recorder = Recorder(settings, read_keys)
        _watch(self, layers.values(), RecordedRuntime(runtime, self.flashmemory_recorder))
        return ModelShape(
            num_layers=shape.num_layers,
            num_query_heads=shape.num_query_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            block_size=shape.block_size,
            anchor_layers=anchors,
            softmax_scale=shape.softmax_scale,
            dtype=str(shape.dtype).removeprefix("torch."),
            layer_indices=() if shape.model_layers == tuple(range(shape.num_layers)) else shape.model_layers,
        )

    def flashmemory_record_along(self: "WorkerBase", req_id: str, prompt_len: int) -> None:
        """See `RecordedRuntime.record_along`."""
        self.flashmemory_runtime.record_along(req_id, prompt_len)

    def flashmemory_take(self: "WorkerBase", req_id: str) -> Recording:
        """The recording of a finished request."""
        return self.flashmemory_recorder.take(req_id)

    def flashmemory_time(self: "WorkerBase") -> None:
        """Keep the oracle's clock from now on."""
        runtime = self.flashmemory_runtime
        if isinstance(runtime, TimedRuntime):
            return
        layers = sizing.attention_layers(self.vllm_config, list(runtime.parts.shape.layer_names))
        _watch(self, layers.values(), TimedRuntime(runtime))


def _scheduled(step_input: "StepInput") -> "tuple[NewRequest | RunningRequest, ...]":
    return (*step_input.new, *step_input.running)


def _watch(worker: "WorkerBase", layers: Any, watched: WatchedRuntime) -> None:
    for index, layer in enumerate(layers):
        layer.impl.bind(layer, watched, index, watched.group_of(index))
    worker.flashmemory_runtime = watched
