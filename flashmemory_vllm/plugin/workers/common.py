"""What our workers add to vLLM's: a residency runtime under the model runner."""

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import set_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.observability.counters import Capacity, CounterWriter, worker_name
from flashmemory_vllm.plugin import compat, sizing
from flashmemory_vllm.plugin.admission import FlashMemorySpec
from flashmemory_vllm.plugin.broken_pages import PageJudge
from flashmemory_vllm.plugin.checks import read_config
from flashmemory_vllm.plugin.counter_files import engine_counters_directory
from flashmemory_vllm.plugin.hybrid_admission import HybridSpec
from flashmemory_vllm.plugin.layers import LayerSplit, find_managed, split_layers
from flashmemory_vllm.plugin.lifeline import hold_on_to_server
from flashmemory_vllm.plugin.request_ids import client_request_id
from flashmemory_vllm.plugin.translate import StepTranslator
from flashmemory_vllm.plugin.workers import hybrid
from flashmemory_vllm.plugin.workers.physical import physical_config
from flashmemory_vllm.plugin.workers.reconfigured import reconfigured
from flashmemory_vllm.runtime.assembly import RuntimeSizes, build_runtime
from flashmemory_vllm.runtime.capacity import GIB, CapacityPlan
from flashmemory_vllm.runtime.status import StripsAsked
from flashmemory_vllm.runtime.trained import anchor_layers, num_kept, query_window

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.worker_base import CompilationTimes

    from flashmemory_vllm.runtime.parts import StepBuffers
    from flashmemory_vllm.runtime.runtime import ResidencyRuntime
    from flashmemory_vllm.runtime.shape import AttentionShape
    from flashmemory_vllm.transfer.host_pool import HostPool

# vLLM sets up handlers for the names below its own only.
logger = init_logger("vllm.flashmemory")


class ResidencyWorker:
    """Mixin before a vLLM worker: N logical blocks towards the scheduler, S slots on the device."""

    vllm_config: Any
    model_runner: Any
    device: torch.device
    rank: int
    # What a worker that fails while it is made has by then
    flashmemory_runtime: "ResidencyRuntime | None" = None
    _counters: CounterWriter | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's worker; our options are read here and stay frozen."""
        hold_on_to_server()
        super().__init__(*args, **kwargs)
        self.flashmemory_config = read_config(self.vllm_config)
        self._counters_dir = engine_counters_directory(self.vllm_config)
        self._capacity: CapacityPlan | None = None
        self._last_slot_token = 0
        self._asked_block_size = self.vllm_config.cache_config.block_size
        self._translator = StepTranslator()
        self._judge = PageJudge(self.rank)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Our spec for each attention layer that is ours, vLLM's own for all others.

        Raises:
            UnsupportedError: a layer can be neither.
        """
        layers = self._read_layers()
        budget = sizing.budget_policy(self.vllm_config, self.flashmemory_config, layers.block_size)
        window = query_window(self.flashmemory_config)
        if not layers.native:
            return {
                name: FlashMemorySpec.from_spec(spec, budget, self._counters_dir, window)
                for name, spec in layers.managed.items()
            }
        managed = {
            name: HybridSpec.among(layers.native_page_bytes, spec, budget, self._counters_dir, window)
            for name, spec in layers.announced.items()
        }
        return managed | layers.native

    def determine_available_memory(self) -> int:
        """Bytes that the scheduler turns into blocks: the host pool's, or the device's for native layers if any.

        Raises:
            ConfigError: the longest request does not fit in the slots, in the host pool or in native layers' blocks.
        """
        device_bytes: int = super().determine_available_memory()  # type: ignore[misc]
        layers = self._read_layers()
        native_bytes = 0
        if layers.native:
            native_bytes = hybrid.native_bytes(self.vllm_config, self.get_kv_cache_spec(), device_bytes)
            logger.info("flashmemory: %.3f GiB on the device for layers other than full attention", native_bytes / GIB)
        self._capacity = sizing.plan(
            self.vllm_config, self.flashmemory_config, layers, device_bytes - native_bytes, self.device
        )
        logger.info("flashmemory: %s", self._capacity.describe())
        return native_bytes or self._capacity.host_bytes

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate S slots where vLLM would allocate N blocks, then attach the residency runtime.

        Raises:
            ConfigError: the scheduler was given more logical blocks than the host pool holds.
        """
        layers = self._read_layers()
        sizes = self._sizes(kv_cache_config, layers)
        if layers.native:
            index = find_managed(kv_cache_config.kv_cache_groups, HybridSpec)
            self._translator = StepTranslator(index, has_native_groups=True)
            hybrid.detach_caches(self.vllm_config, layers)
            super().initialize_from_config(hybrid.native_config(kv_cache_config, layers))  # type: ignore[misc]
            hybrid.bind_caches(self.vllm_config, layers, sizes.num_slots, self.device)
        else:
            super().initialize_from_config(physical_config(self.vllm_config, kv_cache_config, sizes.num_slots))  # type: ignore[misc]
        self._counters = self._open_counters(sizes)
        modules = sizing.attention_layers(self.vllm_config, list(layers.managed))
        shape = sizing.attention_shape(modules, layers, self.device)
        self._attach_runtime(self._build_runtime(shape, sizes.num_logical_blocks, self.flashmemory_config))
        compat.install_slot_translation(self.model_runner, self._set_batch, self._translator.managed)
        compat.keep_steps_out_of_full_graphs(self.model_runner, self._needs_python)

    def _sizes(self, kv_cache_config: KVCacheConfig, layers: LayerSplit) -> Capacity:
        """What was planned, with the blocks that the scheduler has if all of them are ours."""
        capacity = self._capacity
        assert capacity is not None
        if layers.native:
            return Capacity(capacity.num_slots, capacity.num_logical_blocks)
        num_logical_blocks = kv_cache_config.num_blocks
        if num_logical_blocks > capacity.num_logical_blocks:
            raise ConfigError(
                f"--num-gpu-blocks-override: {num_logical_blocks} logical blocks, the host pool holds "
                f"{capacity.num_logical_blocks}; lower the override, or raise what limits the pool: "
                "flashmemory.host_memory_gib or --max-num-seqs"
            )
        return Capacity(min(capacity.num_slots, num_logical_blocks), num_logical_blocks)

    def _read_layers(self) -> LayerSplit:
        """The model's layers, as vLLM reads them now."""
        with set_current_vllm_config(self.vllm_config):
            return split_layers(super().get_kv_cache_spec(), self._asked_block_size)  # type: ignore[misc]

    def flashmemory_reconfigure(self, options: dict[str, object]) -> int:
        """Replace the runtime by one with other options, between requests; after an error the old one serves on.

        The scheduler keeps the slot budgets it started with, so they bound what may be asked for. Its prefix cache
        must be reset afterwards: the new runtime has no blocks.

        Args:
            options: replaces the options given at start, except for those not named.

        Returns:
            Device bytes of the new selector's index keys for each logical block.

        Raises:
            ConfigError: an option is wrong, or would let a request use more slots than the scheduler reserves.
        """
        config = reconfigured(self.vllm_config, options)
        runtime = self._runtime()
        buffers = self._buffers_to_keep(runtime, config)
        built = self._build_runtime(runtime.parts.shape, runtime.num_logical_blocks, config, buffers, runtime.pool)
        # Its last copies use the pool that the new one takes over.
        runtime.synchronize()
        self._attach_runtime(built)
        self.flashmemory_config = config
        return built.index_bytes_per_block

    def flashmemory_status(self, longest_known: int = 0, engine_request_id: str = "") -> dict[str, Any] | None:
        """What the first worker holds: the fields of `status_reader.Status`. vLLM calls it between two steps.

        Other ranks, whose steps wait as well, tell nothing. The arguments are those of `StripsAsked`.
        """
        if self.rank:
            return None
        started = time.perf_counter()
        status = self._runtime().status(client_request_id, StripsAsked(longest_known, engine_request_id))
        assert self._counters is not None
        self._counters.add("status_seconds_total", time.perf_counter() - started)
        return {"engine": self.vllm_config.parallel_config.data_parallel_index, "rank": self.rank, **status}

    def compile_or_warm_up_model(self) -> "CompilationTimes":
        """As vLLM's. Its warm-up requests name physical blocks, below S, so they pass by the runtime."""
        self._runtime().warm_up()
        runtime, self.flashmemory_runtime = self._runtime(), None
        self._last_slot_token = runtime.last_slot_token
        assert self._capacity is not None
        try:
            with hybrid.at_most_blocks(self.model_runner.kv_cache_config, self._capacity.num_slots):
                times: CompilationTimes = super().compile_or_warm_up_model()  # type: ignore[misc]
        finally:
            self.flashmemory_runtime = runtime
        return times

    def execute_model(self, scheduler_output: "SchedulerOutput") -> Any:
        """Plan and start this step's copies, run the model, then write back and select."""
        runtime = self.flashmemory_runtime
        if runtime is None:
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        with torch.inference_mode(), runtime.step(self._translator.translate(scheduler_output)):
            output = super().execute_model(scheduler_output)  # type: ignore[misc]
        return self._judge.judged(output, runtime)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """As vLLM's; names the blocks that the step has read and should not have."""
        return self._judge.judged(super().sample_tokens(grammar_output), self.flashmemory_runtime)  # type: ignore[misc]

    def sleep(self, level: int = 1) -> None:
        """As vLLM's; device pages are about to be discarded, so nothing stays resident."""
        if self.flashmemory_runtime is not None and level > 0:
            self.flashmemory_runtime.reset()
        super().sleep(level)  # type: ignore[misc]

    def shutdown(self) -> None:
        """As vLLM's; unpins the host pool first, which can take long. After a device fault every step is taken, too."""
        runtime, self.flashmemory_runtime = self.flashmemory_runtime, None
        with ExitStack() as steps:  # the last one put in is the first one taken
            steps.callback(super().shutdown)  # type: ignore[misc]
            if self._counters is not None:
                steps.callback(self._counters.close)
            if runtime is not None:
                steps.callback(runtime.release)

    def _set_batch(self, req_ids: list[str], seq_lens: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        if self.flashmemory_runtime is not None:
            self.flashmemory_runtime.set_batch(req_ids, seq_lens, slot_mapping)
        else:
            slot_mapping.clamp_(max=self._last_slot_token)

    def _needs_python(self) -> bool:
        return self.flashmemory_runtime is not None and self.flashmemory_runtime.needs_python

    def _runtime(self) -> "ResidencyRuntime":
        assert self.flashmemory_runtime is not None, "the KV cache is not initialised yet"
        return self.flashmemory_runtime

    def _buffers_to_keep(self, runtime: "ResidencyRuntime", config: FlashMemoryConfig) -> "StepBuffers | None":
        """The buffers that captured graphs refer to, if the new options can go on with them."""
        shape = runtime.parts.shape
        groups = shape.layer_groups(config.layer_groups)
        has_room = num_kept(config) <= runtime.buffers.tables.sizes.num_kept
        if groups == runtime.groups and anchor_layers(config, shape) == runtime.anchors and has_room:
            return runtime.buffers
        if self.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
            raise ConfigError(
                "flashmemory.anchor_layers, flashmemory.layer_groups: cannot be changed once CUDA graphs are captured, "
                "nor flashmemory.tau_steps raised where all tokens are remembered; allowed with --enforce-eager"
            )
        return None

    def _build_runtime(
        self,
        shape: "AttentionShape",
        num_logical_blocks: int,
        config: FlashMemoryConfig,
        buffers: "StepBuffers | None" = None,
        pool: "HostPool | None" = None,
    ) -> "ResidencyRuntime":
        """A runtime over the allocated KV cache; the worker and its layers are left as they are."""
        assert self._counters is not None
        assert self._capacity is not None
        layers = sizing.attention_layers(self.vllm_config, list(shape.layer_names))
        return build_runtime(
            shape=shape,
            caches=[layer.kv_cache for layer in layers.values()],
            kind=sizing.page_kind(layers, shape),
            config=config,
            budget=sizing.budget_policy(self.vllm_config, config, shape.block_size),
            sizes=RuntimeSizes(
                num_logical_blocks=num_logical_blocks,
                staging_blocks=self._capacity.beside.staging.blocks,
                max_num_seqs=self.vllm_config.scheduler_config.max_num_seqs,
                max_num_tokens=sizing.max_num_tokens(self.vllm_config),
            ),
            counters=self._counters,
            buffers=buffers,
            pool=pool,
        )

    def _attach_runtime(self, runtime: "ResidencyRuntime") -> None:
        """Bind every attention layer to a runtime, and step with it from now on."""
        layers = sizing.attention_layers(self.vllm_config, list(runtime.parts.shape.layer_names))
        for index, layer in enumerate(layers.values()):
            layer.impl.bind(layer, runtime, index, runtime.group_of(index))
        self.flashmemory_runtime = runtime

    def _open_counters(self, capacity: Capacity) -> CounterWriter:
        writer = CounterWriter.create(self._counters_dir, worker_name(self.rank))
        writer.publish_capacity(capacity)
        return writer
