"""The process behind `tests.helpers.engine.run_engine`: JSON on standard input, JSON as the last line of output."""

import json
import sys
from typing import Any


def main() -> None:
    """Generate every round and print the result."""
    from vllm import LLM, SamplingParams

    request = json.load(sys.stdin)
    llm = LLM(**request["engine"])
    sampling = SamplingParams(temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False)
    tokens = []
    for prompts in request["rounds"]:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        tokens.append([list(output.outputs[0].token_ids) for output in outputs])
    result = {
        "tokens": tokens,
        "counters": _counters(llm) if request["ours"] else {},
        "metrics": _metrics(llm),
    }
    sys.stdout.write("\n" + json.dumps(result) + "\n")


def _counters(llm: Any) -> dict[str, float]:
    from flashmemory_vllm.observability.counters import CounterReader
    from flashmemory_vllm.plugin.counter_files import engine_counters_directory

    return CounterReader(engine_counters_directory(llm.llm_engine.vllm_config)).read()


def _metrics(llm: Any) -> dict[str, float]:
    wanted = {"vllm:num_preemptions": "preemptions", "vllm:prefix_cache_hits": "prefix_cache_hits"}
    found = {wanted[metric.name]: float(metric.value) for metric in llm.get_metrics() if metric.name in wanted}
    return {name: found.get(name, 0.0) for name in wanted.values()}


if __name__ == "__main__":
    main()
