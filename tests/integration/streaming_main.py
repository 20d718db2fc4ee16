"""The process behind `test_streaming_input`: streams turns into sessions, and asks the same as whole prompts."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tests.helpers.tiny_model import random_prompts

# Tokens of each turn, and of the answer to it. The first turn of the first session ends within a block (79 tokens have
# KV), that of the second on the boundary of one (64).
SESSIONS = {"within": ((73, 7), (33, 9), (90, 12)), "aligned": ((57, 8), (25, 8), (89, 8))}


async def stream(llm: Any, name: str, turns: Sequence[Sequence[int]], answer_lens: Sequence[int]) -> list[list[int]]:
    """The answers to turns, each sent once the one before it is answered."""
    from vllm.engine.protocol import StreamingInput

    answers: list[list[int]] = [[]]
    is_answered = asyncio.Event()

    async def client() -> AsyncIterator[StreamingInput]:
        for turn, num_tokens in zip(turns, answer_lens, strict=True):
            is_answered.clear()
            yield StreamingInput(
                prompt={"prompt_token_ids": list(turn), "type": "token"}, sampling_params=_params(num_tokens)
            )
            await is_answered.wait()

    async for output in llm.generate(client(), _params(4), name):
        answers[-1] += output.outputs[0].token_ids
        if len(answers) <= len(turns) and len(answers[-1]) >= answer_lens[len(answers) - 1]:
            answers.append([])
            is_answered.set()
    return answers[: len(turns)]


async def ask(llm: Any, name: str, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The answer to a whole prompt."""
    tokens: list[int] = []
    async for output in llm.generate({"prompt_token_ids": list(prompt)}, _params(num_tokens), name):
        tokens += output.outputs[0].token_ids
    return tokens


def _params(num_tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=num_tokens, output_kind=RequestOutputKind.DELTA
    )


async def main(engine: dict[str, Any]) -> None:
    """Two sessions and a plain request at once; then what the sessions should have said."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine))
    turns = {
        name: [random_prompts(1, size, size, seed=100 * place + size)[0] for size, _ in sizes]
        for place, (name, sizes) in enumerate(SESSIONS.items())
    }
    lens = {name: [num_tokens for _, num_tokens in sizes] for name, sizes in SESSIONS.items()}
    plain = random_prompts(1, 80, 80, seed=5)[0]
    tasks = [asyncio.create_task(stream(llm, name, turns[name], lens[name])) for name in SESSIONS]
    beside = await ask(llm, "beside", plain, 40)
    streamed = [await task for task in tasks]
    expected: list[list[list[int]]] = []
    for name, answers in zip(SESSIONS, streamed, strict=True):
        context: list[int] = []
        expected.append([])
        for turn, answer in zip(turns[name], answers, strict=True):
            context += turn
            expected[-1].append(await ask(llm, f"{name} {len(context)}", context, len(answer)))
            context += answer[:-1]  # vLLM discards the last token of a turn
    alone = await ask(llm, "alone", plain, 40)
    result = {"streamed": [*streamed, beside], "expected": [*expected, alone]}
    sys.stdout.write(f"\nstreamed: {json.dumps(result)}\n")
    llm.shutdown()


if __name__ == "__main__":
    asyncio.run(main(json.load(sys.stdin)))
