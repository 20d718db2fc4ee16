"""Engines inside this process that record their requests, or decode with a selector that knows the future."""

from collections.abc import Iterator, Mapping, Sequence

from flashmemory_vllm.capture.document import Recording
from flashmemory_vllm.capture.prompts import Prompt, prompt_digest
from flashmemory_vllm.capture.recorder import Choices
from flashmemory_vllm.capture.writer import ModelShape
from flashmemory_vllm.indexer.oracle import Future, OracleSelector
from flashmemory_vllm.plugin.names import CAPTURE_EXTENSION
from flashmemory_vllm.plugin.offline import OfflineGenerator

ORACLE = OracleSelector.name


class _StepByStep(OfflineGenerator):
    """An engine whose requests begin one by one, and whose worker can be watched."""

    def __init__(
        self,
        model: str,
        engine_args: Mapping[str, object],
        options: Mapping[str, object],
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        super().__init__(model, {**engine_args, "worker_extension_cls": CAPTURE_EXTENSION}, options, stop_token_ids)

    def _begin(self, name: str, ids: Sequence[int], max_tokens: int) -> str:
        """Queue a prompt; returns the id that the worker sees."""
        engine = self._llm.llm_engine
        (rendered,) = engine.renderer.render_cmpl([{"prompt_token_ids": list(ids)}])
        req_id: str = engine.add_request(name, rendered, self._sampling(max_tokens))
        return req_id

    def _step(self) -> Iterator[tuple[str, list[int]]]:
        """Names and output ids of the prompts that one step finished."""
        for output in self._llm.llm_engine.step():
            if output.finished:
                yield output.request_id, list(output.outputs[0].token_ids)


class CaptureEngine(_StepByStep):
    """Greedy generation with dense attention, or given text, recorded; see `_StepByStep` for the other arguments.

    Args:
        model: folder or Hugging Face id of the model.
        engine_args: further arguments of `vllm.LLM`.
        anchor_layers: layers whose queries and pooled keys are recorded, among all of the model. None for our default.
        max_output_tokens: most tokens of an answer.
        stop_token_ids: tokens that end an answer, beside the model's own.
        host_memory_gib: host memory for KV. Default: our default.
    """

    def __init__(
        self,
        model: str,
        engine_args: Mapping[str, object],
        anchor_layers: tuple[int, ...] | None,
        max_output_tokens: int,
        stop_token_ids: Sequence[int] = (),
        host_memory_gib: float | None = None,
    ) -> None:
        options: dict[str, object] = {
            "resident_ratio": 1.0,
            "selector": "full",
            "anchor_layers": anchor_layers,
            # Slots for all of a request from its admission on: none is ever preempted.
            "growth_reserve_tokens": max_output_tokens,
        }
        if host_memory_gib is not None:
            options["host_memory_gib"] = host_memory_gib
        # A block that is found, not computed, would have no recorded keys; a replayed graph would pass by the recorder.
        recordable = {"enable_prefix_caching": False, "enforce_eager": True}
        super().__init__(model, {**engine_args, **recordable}, options, stop_token_ids)
        # By name the id that the worker sees, and what was asked
        self._asked: dict[str, tuple[str, Prompt]] = {}

    def record(self, choices: Choices, anchor_layers: tuple[int, ...] | None = None) -> ModelShape:
        """Record all requests from now on.

        Args:
            choices: what to keep.
            anchor_layers: layers to keep queries and keys of, counted among those of full attention. Default: those of
                the engine.
        """
        told = self._llm.collective_rpc("flashmemory_record", args=(choices, anchor_layers))
        shape: ModelShape = told[0]
        return shape

    @property
    def model_type(self) -> str:
        """The architecture that the model's configuration names."""
        kind: str = self._llm.llm_engine.vllm_config.model_config.hf_config.model_type
        return kind

    def submit(self, name: str, prompt: Prompt) -> None:
        """Begin a prompt. Along a text it is one long prefill: what tokens attend to is the same as in decode steps."""
        if not prompt.forced:
            self._asked[name] = self._begin(name, prompt.ids, prompt.max_tokens), prompt
            return
        req_id = self._begin(name, (*prompt.ids, *prompt.forced[:-1]), 1)
        self._llm.collective_rpc("flashmemory_record_along", args=(req_id, len(prompt.ids)))
        self._asked[name] = req_id, prompt

    def finished(self) -> Iterator[tuple[str, list[int], Recording]]:
        """Run one step; names, output ids and recordings of the prompts that it finished."""
        for name, output_ids in self._step():
            req_id, prompt = self._asked.pop(name)
            recording = self._llm.collective_rpc("flashmemory_take", args=(req_id,))[0]
            yield name, list(prompt.forced) or output_ids, recording


class OracleGenerator(_StepByStep):
    """Greedy generation with any selector, `oracle` among them, which looks the future up; for evaluation only.

    Args:
        future: what dense attention looked at, for every prompt that the oracle will be asked.
        model: folder of the model.
        engine_args: further arguments of `vllm.LLM`.
        options: our options at start. Default selector: `oracle`.
        stop_token_ids: tokens that end an answer, beside the model's own.
    """

    def __init__(
        self,
        future: Future,
        model: str,
        engine_args: Mapping[str, object],
        options: Mapping[str, object],
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        OracleSelector.future = self._future = future
        given = {"selector": ORACLE, **options}
        super().__init__(model, engine_args, given, stop_token_ids)
        self._watch_clock(given)

    def reconfigure(self, options: Mapping[str, object]) -> None:
        """As `OfflineGenerator.reconfigure`."""
        super().reconfigure(options)
        self._watch_clock(self._options | dict(options))

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int] | int) -> list[list[int]]:
        """As `OfflineGenerator.generate`.

        Raises:
            ConfigError: the selector is `oracle`, and the future does not know a prompt.
        """
        if not self._is_oracle:
            return super().generate(prompts, max_tokens)
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        for index, (ids, limit) in enumerate(zip(prompts, limits, strict=True)):
            self._future.name(self._begin(str(index), ids, limit), prompt_digest(ids))
        answers: dict[str, list[int]] = {}
        while len(answers) < len(prompts):
            answers.update(self._step())
        return [answers[str(index)] for index in range(len(prompts))]

    def _watch_clock(self, options: Mapping[str, object]) -> None:
        """A new runtime has to be watched anew."""
        self._is_oracle = options["selector"] == ORACLE
        if self._is_oracle:
            self._llm.collective_rpc("flashmemory_time")

    def close(self) -> None:
        """Stop the engine and forget the future."""
        super().close()
        OracleSelector.future = None
