"""The process behind `tests.helpers.engine.run_engine`: JSON on standard input, one marked line of JSON on output."""

import json
import sys
from dataclasses import asdict
from typing import Any

from tests.helpers.engine import RESULT_MARK


def main() -> None:
    """Generate every round and print the result."""
    from vllm import LLM, SamplingParams

    from tests.helpers.oracle import AttentionOracle

    request = json.load(sys.stdin)
    oracle = AttentionOracle()
    if request["oracle"]:
        oracle.install()
    if request["async_scheduling"]:
        force_async_scheduling()
    llm = LLM(**request["engine"])
    sampling = SamplingParams(temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False)
    tokens = []
    for prompts in request["rounds"]:
        if request["reset_prefix_cache"]:
            assert llm.reset_prefix_cache()
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        tokens.append([list(output.outputs[0].token_ids) for output in outputs])
    result = {
        "tokens": tokens,
        "counters": counters_of(llm) if request["ours"] else {},
        "metrics": _metrics(llm),
        "checked": {kind: asdict(checked) for kind, checked in oracle.checked.items()},
        **_machinery(llm),
    }
    sys.stdout.write(f"\n{RESULT_MARK}{json.dumps(result)}\n")


def force_async_scheduling() -> None:
    """Switch on what vLLM's CPU platform switches off, right after it has done so."""
    from vllm.platforms import current_platform

    platform_cls = type(current_platform)
    original = platform_cls.check_and_update_config

    def check_and_update_config(cls: type, vllm_config: Any) -> None:  # noqa: ARG001
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    platform_cls.check_and_update_config = classmethod(check_and_update_config)


def _machinery(llm: Any) -> dict[str, Any]:
    """What really ran: the engine lies in this process, and so does its worker if there is only one."""
    core = llm.llm_engine.engine_core.engine_core
    driver = getattr(core.model_executor, "driver_worker", None)
    runner = type(driver.worker.model_runner) if driver is not None else None
    return {
        "model_runner": "" if runner is None else f"{runner.__module__}.{runner.__qualname__}",
        "scheduler": type(core.scheduler).__name__,
        "max_batches": core.batch_queue_size,
        "compilation": core.vllm_config.compilation_config.mode.name,
    }


def counters_of(llm: Any) -> dict[str, float]:
    """Our counters of an engine."""
    from flashmemory_vllm.observability.counters import CounterReader
    from flashmemory_vllm.plugin.counter_files import engine_counters_directory

    return CounterReader(engine_counters_directory(llm.llm_engine.vllm_config)).read()


def _metrics(llm: Any) -> dict[str, float]:
    wanted = {"vllm:num_preemptions": "preemptions", "vllm:prefix_cache_hits": "prefix_cache_hits"}
    found = {wanted[metric.name]: float(metric.value) for metric in llm.get_metrics() if metric.name in wanted}
    return {name: found.get(name, 0.0) for name in wanted.values()}


if __name__ == "__main__":
    main()
