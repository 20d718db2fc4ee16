"""An engine inside this process whose options can be changed between requests; what evaluation runs on."""

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from vllm import LLM, SamplingParams

from flashmemory_vllm.config import SECTION
from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.observability.counters import CounterReader
from flashmemory_vllm.plugin.counter_files import engine_counters_directory
from flashmemory_vllm.plugin.register import register

INDEX_BYTES = "index_bytes_per_block"


class OfflineGenerator:
    """Greedy generation from token ids, with the engine core and its worker in this process.

    Args:
        model: folder of the model.
        engine_args: further arguments of `vllm.LLM`.
        options: our options at start. The scheduler's budgets follow their resident ratio for good, so it is
            the largest that `reconfigure` may ask for.
        stop_token_ids: tokens that end an answer, beside the model's own.
    """

    def __init__(
        self,
        model: str,
        engine_args: Mapping[str, object],
        options: Mapping[str, object],
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        # One process: no plugin needs to be found by another, and an interrupt ends everything.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        register()
        self._options = dict(options)
        self._stop_token_ids = list(stop_token_ids)
        self._index_bytes: float | None = None
        arguments: dict[str, Any] = {"skip_tokenizer_init": True, **engine_args}
        self._llm = LLM(
            model=model,
            attention_backend="flashmemory",
            additional_config={SECTION: self._options},
            **arguments,
        )

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int] | int) -> list[list[int]]:
        """Continue each prompt greedily until a stop token or the limit.

        Args:
            prompts: token ids.
            max_tokens: tokens to generate at most, for each prompt or for all.

        Returns:
            Generated ids for each prompt, the stop token included.
        """
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [self._sampling(limit) for limit in limits],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def reconfigure(self, options: Mapping[str, object]) -> None:
        """Go on with other options, an empty prefix cache and no residency.

        Args:
            options: replace those given at start; what is not named goes back to that.

        Raises:
            ConfigError: an option is wrong, or asks for a larger resident ratio than at start.
            IntegrityError: requests are still running.
        """
        wanted = self._options | dict(options)
        told = self._llm.collective_rpc("flashmemory_reconfigure", args=(wanted,))
        if not self._llm.reset_prefix_cache():
            raise IntegrityError("the prefix cache holds blocks of running requests: allowed is none")
        self._index_bytes = max((float(one) for one in told if isinstance(one, int)), default=None)

    def counters(self) -> dict[str, float]:
        """Our metrics by name without the prefix, and `index_bytes_per_block` if the workers told it."""
        values = CounterReader(engine_counters_directory(self._llm.llm_engine.vllm_config)).read()
        return values if self._index_bytes is None else values | {INDEX_BYTES: self._index_bytes}

    def close(self) -> None:
        """Stop the engine; it must not be used afterwards."""
        self._llm.llm_engine.engine_core.shutdown()

    def _sampling(self, max_tokens: int) -> SamplingParams:
        return SamplingParams(
            temperature=0.0, max_tokens=max_tokens, stop_token_ids=self._stop_token_ids, detokenize=False
        )

    def __enter__(self) -> "OfflineGenerator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
