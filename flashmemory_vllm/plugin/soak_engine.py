"""The engines of a soak: ours, driven step by step in this process, and vLLM's own as the dense reference."""

import ctypes
import faulthandler
import gc
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor

from flashmemory_vllm.config import SECTION
from flashmemory_vllm.observability.counters import CounterReader
from flashmemory_vllm.plugin.counter_files import engine_counters_directory
from flashmemory_vllm.plugin.register import register
from flashmemory_vllm.soak.drive import Part
from flashmemory_vllm.soak.judge import Query
from flashmemory_vllm.soak.leftovers import find_mentions
from flashmemory_vllm.soak.trace import SoakRequest

MIB = 1 << 20
_METRICS = {"vllm:num_preemptions": "preemptions", "vllm:prefix_cache_hits": "prefix_hit_tokens"}


class ServedEngine:
    """Our engine: core, scheduler and worker in this process, so that nothing they keep is out of sight.

    Args:
        arguments: of `vllm.EngineArgs`.
        options: of our section of `additional_config`.
        adapters: folders of LoRA adapters.
        is_async: schedule a step before the one before it has returned, on a CPU too.
        patience: seconds after which a step hangs: the process tells where each thread is, and ends.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        options: Mapping[str, Any],
        adapters: Sequence[Path],
        *,
        is_async: bool,
        patience: float,
    ) -> None:
        register()
        args = EngineArgs(
            **arguments,
            attention_backend="flashmemory",
            additional_config={SECTION: dict(options)},
            disable_log_stats=False,
            async_scheduling=is_async,
        )
        config = args.create_engine_config(UsageContext.LLM_CLASS)
        # vLLM's CPU platform switches it off whatever is asked for
        config.scheduler_config.async_scheduling = is_async
        self._config = config
        self._patience = patience
        self._engine = LLMEngine(config, Executor.get_class(config), log_stats=True)
        self._core = self._engine.engine_core.engine_core
        self._worker = self._core.model_executor.driver_worker.worker
        # What was never written is NaN, and the process has all of the pool's pages from the start
        self._worker.flashmemory_runtime._parts.engine.pool.poison()
        self._adapters = [*_requests(adapters)]
        self._is_whole: dict[str, bool] = {}
        self._names: list[str] = []

    def add(self, request: SoakRequest, prompt: Sequence[int]) -> None:
        """Start a request."""
        is_forked = request.num_answers > 1
        sampling = SamplingParams(
            n=request.num_answers,
            temperature=1.0 if is_forked else 0.0,
            min_p=1.0 if is_forked else 0.0,
            max_tokens=request.max_tokens,
            ignore_eos=not request.answer,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if request.is_streamed else RequestOutputKind.CUMULATIVE,
        )
        self._is_whole[request.name] = not request.is_streamed
        lora = self._adapters[request.adapter - 1] if request.adapter else None
        self._engine.add_request(request.name, tokens_input(list(prompt)), sampling, lora_request=lora)
        self._names += self._engine.output_processor.external_req_ids[request.name]

    def abort(self, name: str) -> None:
        """End a request."""
        self._engine.abort_request([name])
        self._is_whole.pop(name, None)

    def step(self) -> list[Part]:
        """Run one engine step."""
        faulthandler.dump_traceback_later(self._patience, exit=True)
        outputs = self._engine.step()
        faulthandler.cancel_dump_traceback_later()
        return [
            Part(
                output.request_id,
                answer.index,
                list(answer.token_ids),
                self._is_whole.get(output.request_id, False),
                answer.finish_reason is not None,
            )
            for output in outputs
            for answer in output.outputs
        ]

    def has_work(self) -> bool:
        """Whether a request is unfinished, or the worker has yet to be told of one that is."""
        return bool(self._core.scheduler.has_requests() or self._core.batch_queue)

    def look(self) -> dict[str, float]:
        """Blocks on the host and running requests."""
        counters = self.counters()
        running, waiting = self._core.scheduler.get_request_counts()
        return {"host_blocks": counters["host_blocks_used"], "running": running, "waiting": waiting}

    def measure(self) -> dict[str, float]:
        """MiB of the process, of device memory and of pinned memory, after what is not referred to is given back."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        figures = {"rss_mib": _rss_mib(), "device_mib": 0.0, "pinned_mib": 0.0}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            pinned = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
            figures["device_mib"] = torch.cuda.memory_allocated() / MIB
            figures["pinned_mib"] = pinned / MIB
        return figures

    def counters(self) -> dict[str, float]:
        """Our metrics by name without the prefix, and what vLLM counts itself."""
        ours = CounterReader(engine_counters_directory(self._config)).read()
        theirs = {_METRICS[one.name]: float(one.value) for one in self._engine.get_metrics() if one.name in _METRICS}
        return {**ours, **theirs}

    def leaks(self) -> dict[str, Any]:
        """What the idle engine still holds.

        Returns:
            `leaked_slots` that a request pins or has reserved, `leaked_blocks` of vLLM's pool, and the places of
            `leaked_entries` that name a request.
        """
        pool = self._core.scheduler.kv_cache_manager.block_pool
        (manager,) = self._core.scheduler.kv_cache_manager.coordinator.single_type_managers
        runtime = self._worker.flashmemory_runtime
        status = self._worker.flashmemory_status()
        ours = {"manager": manager.__dict__, "worker": self._worker, "runtime": runtime}
        theirs = {"scheduler": self._core.scheduler.requests, "outputs": self._engine.output_processor.request_states}
        return {
            "leaked_slots": status["memory"]["slots_pinned"] + manager._ledger.reserved,
            # One block is the null block
            "leaked_blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "leaked_entries": find_mentions({**ours, **theirs}, self._names),
        }

    def machinery(self) -> dict[str, Any]:
        """What really ran."""
        runner = type(self._worker.model_runner)
        graphs = self._config.compilation_config.cudagraph_mode
        return {
            "model_runner": f"{runner.__module__}.{runner.__qualname__}",
            "scheduler": type(self._core.scheduler).__name__,
            "cuda_graphs": "NONE" if graphs is None else graphs.name,
        }

    def close(self) -> None:
        """Stop the engine; it must not be used afterwards."""
        self._engine.engine_core.shutdown()


class DenseReference:
    """VLLM with its own backend.

    Args:
        arguments: of `vllm.LLM`.
        adapters: folders of LoRA adapters.
    """

    def __init__(self, arguments: Mapping[str, Any], adapters: Sequence[Path]) -> None:
        self._llm = LLM(**arguments)
        self._adapters = [*_requests(adapters)]

    def generate(self, queries: Sequence[Query]) -> list[list[int]]:
        """Continue each prompt greedily by exactly `max_tokens`."""
        sampling = [
            SamplingParams(temperature=0.0, max_tokens=query.max_tokens, ignore_eos=True, detokenize=False)
            for query in queries
        ]
        prompts = [tokens_input(list(query.prompt)) for query in queries]
        loras = [self._adapters[query.adapter - 1] if query.adapter else None for query in queries]
        outputs = self._llm.generate(prompts, sampling, use_tqdm=False, lora_request=loras)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """Stop the engine and let go of its memory; it must not be used afterwards."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _requests(adapters: Sequence[Path]) -> list[LoRARequest]:
    return [LoRARequest(folder.name, number, str(folder)) for number, folder in enumerate(adapters, start=1)]


def _rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / MIB
