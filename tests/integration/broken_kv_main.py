"""An engine some of whose KV becomes NaN in host memory between two requests: JSON in, one marked line of JSON out."""

import json
import sys
from typing import Any

import torch

from tests.helpers.engine import RESULT_MARK
from tests.helpers.engine_main import counters_of, force_async_scheduling


def main() -> None:
    """Ask, evict, break the first block, and ask again."""
    from vllm import LLM, SamplingParams

    request = json.load(sys.stdin)
    if request["async_scheduling"]:
        force_async_scheduling()
    llm = LLM(**request["engine"])
    sampling = SamplingParams(temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False)

    def ask(*prompts: list[int]) -> list[dict[str, Any]]:
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = [output.outputs[0] for output in llm.generate(given, sampling, use_tqdm=False)]
        return [
            {"tokens": list(answer.token_ids), "finish": answer.finish_reason, "stop": answer.stop_reason}
            for answer in answers
        ]

    (victim,), others, (beside,) = request["rounds"]
    result: dict[str, Any] = {"first": ask(victim)[0]}
    ask(*others)
    _break_first_block(llm)
    result["again"], result["beside"] = ask(victim, beside)
    result["third"] = ask(victim)[0]
    assert llm.reset_prefix_cache()
    result["beside alone"] = ask(beside)[0]
    result["counters"] = counters_of(llm)
    sys.stdout.write(f"\n{RESULT_MARK}{json.dumps(result)}\n")


def _break_first_block(llm: Any) -> None:
    """Change the block that the engine's first request began with, on the last rank."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    assert sum(executor.collective_rpc(_break_block_of_last_rank)) == 1


def _break_block_of_last_rank(worker: Any) -> bool:
    """Make all of the block NaN in the first layer, whatever the dtype."""
    if worker.rank + 1 < worker.parallel_config.world_size:
        return False
    parts, block = worker.flashmemory_runtime._parts, 1
    assert parts.planner._slots.host_valid[block]
    assert parts.planner.lut[0, block] < 0, "the block is still on the device"
    parts.engine.pool.layer_view(0)[block].view(torch.uint8).fill_(0xFF)
    return True


if __name__ == "__main__":
    main()
