"""A vLLM engine that is driven step by step, as a server's is, and says what each step gave."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm import LLM, SamplingParams
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind

from flashmemory_vllm.config import SECTION
from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.observability.counters import CounterReader
from flashmemory_vllm.plugin.counter_files import engine_counters_directory
from flashmemory_vllm.plugin.kv_bytes import KvBytes
from flashmemory_vllm.plugin.register import register

PREEMPTIONS = "vllm:num_preemptions"
_KV_BYTES = f"{KvBytes.__module__}.{KvBytes.__qualname__}"
# A scheduler gives an aborted request's blocks back with its next step at the latest
RESET_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """What an engine allocated.

    Attributes:
        block_size: tokens of a KV block.
        num_blocks: blocks that the scheduler can give away; those of windows and states where they are beside ours.
        device_kv_bytes: device memory of KV pages and states on the first rank, without index keys and staging.
        max_model_len: tokens of the longest request.
    """

    block_size: int
    num_blocks: int
    device_kv_bytes: int
    max_model_len: int


class BenchEngine:
    """One engine, its core in a process of its own unless the environment says otherwise.

    Args:
        arguments: of `vllm.LLM`.
        options: of our section of `additional_config`, or None for vLLM's own backend.
    """

    def __init__(self, arguments: Mapping[str, Any], options: Mapping[str, Any] | None) -> None:
        self._is_ours = options is not None
        ours: dict[str, Any] = {}
        if options is not None:
            register()
            ours = {"attention_backend": "flashmemory", "additional_config": {SECTION: dict(options)}}
        # Without its statistics vLLM tells neither preemptions nor times
        common = {"skip_tokenizer_init": True, "disable_log_stats": False, "worker_extension_cls": _KV_BYTES}
        self._llm = LLM(**{**common, **arguments, **ours})
        self._engine = self._llm.llm_engine
        self._config = self._engine.vllm_config
        self._num_submitted = 0
        self._requests: dict[str, int] = {}
        self.vocabulary: int = self._config.model_config.get_vocab_size()

    def submit(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        """Start a greedy request for each prompt, to go on for `max_tokens` whatever is generated."""
        self._requests = {}
        for place, prompt in enumerate(prompts):
            name = str(self._num_submitted)
            self._num_submitted += 1
            self._requests[name] = place
            sampling = SamplingParams(
                temperature=0.0,
                max_tokens=max_tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            self._engine.add_request(name, tokens_input(list(prompt)), sampling)

    def step(self) -> tuple[float, dict[int, list[int]]] | None:
        """Wait for the next step's tokens.

        Returns:
            When the scheduler had them, in seconds of the machine's monotonic clock, since several steps' can reach
            this process at once; and new token ids by the place of their prompt. None if there are no tokens.
        """
        outputs = [output for output in self._engine.step() if output.outputs[0].token_ids]
        if not outputs:
            return None
        tokens = {self._requests[output.request_id]: list(output.outputs[0].token_ids) for output in outputs}
        return outputs[0].metrics.last_token_ts, tokens

    def is_busy(self) -> bool:
        """Whether a request is unfinished."""
        return bool(self._engine.has_unfinished_requests())

    def abort(self) -> None:
        """End every request."""
        self._engine.abort_request(list(self._requests))

    def forget_prefixes(self) -> None:
        """Empty the prefix cache.

        Raises:
            IntegrityError: requests hold blocks of it, and go on doing so.
        """
        deadline = time.monotonic() + RESET_SECONDS
        while not self._llm.reset_prefix_cache():
            if time.monotonic() > deadline:
                raise IntegrityError("the prefix cache holds blocks of running requests: allowed is none")
            time.sleep(0.05)

    def counters(self) -> dict[str, float]:
        """Our metrics by name without the prefix; empty if the backend is vLLM's own."""
        return CounterReader(engine_counters_directory(self._config)).read() if self._is_ours else {}

    def preemptions(self) -> int:
        """Requests that were preempted since the start."""
        return int(sum(one.value for one in self._llm.get_metrics() if one.name == PREEMPTIONS))

    def sizes(self) -> EngineSizes:
        """What was allocated."""
        cache, model = self._config.cache_config, self._config.model_config
        kv_bytes = self._llm.collective_rpc(KvBytes.flashmemory_kv_bytes.__name__)
        return EngineSizes(cache.block_size, int(cache.num_gpu_blocks), kv_bytes[0], model.max_model_len)

    def close(self) -> None:
        """Stop the engine; it must not be used afterwards."""
        self._engine.engine_core.shutdown()
