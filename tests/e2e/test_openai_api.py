"""What the official client of the OpenAI API sees: right answers, streams, concurrency, aborts, errors."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import BadRequestError, OpenAI

from flashmemory_vllm.cli.server import MODEL_NAME, Server
from tests.e2e.questions import Question, make_questions

NUM_TOKENS = 4096
NUM_AT_ONCE = 8
PATIENCE_SECONDS = 60


def complete(client: OpenAI, question: Question) -> str:
    answer = client.completions.create(model=MODEL_NAME, prompt=question.prompt, max_tokens=16, temperature=0)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == question.num_tokens
    assert answer.choices[0].finish_reason == "stop"
    return answer.choices[0].text.strip()


def wait_until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def test_text_is_completed(client: OpenAI) -> None:
    (question,) = make_questions("multikey", NUM_TOKENS, 1, seed=0)
    assert complete(client, question) == question.answer


def test_a_chat_is_answered(client: OpenAI) -> None:
    (question,) = make_questions("multikey", NUM_TOKENS, 1, seed=10, chat=True)
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=[{"role": "user", "content": question.prompt}], max_tokens=16, temperature=0
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == question.num_tokens
    assert (answer.choices[0].message.content or "").strip() == question.answer


def test_a_stream_carries_the_same_text(client: OpenAI) -> None:
    (question,) = make_questions("multikey", NUM_TOKENS, 1, seed=20)
    stream = client.completions.create(
        model=MODEL_NAME,
        prompt=question.prompt,
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert len([piece for piece in pieces if piece]) == len(question.answer.split())
    assert "".join(pieces).strip() == question.answer
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == question.num_tokens


def test_more_requests_than_the_slots_admit_are_all_served(client: OpenAI, server: Server) -> None:
    """In prefill each reserves a chunk of 65 slots of the 143: most of the eight must wait."""
    questions = make_questions("multikey", NUM_TOKENS, NUM_AT_ONCE, seed=30)
    before = server.read_metrics()["flashmemory:refused_admissions_total"]
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        answers = list(pool.map(lambda question: complete(client, question), questions))
    assert answers == [question.answer for question in questions]
    assert server.read_metrics()["flashmemory:refused_admissions_total"] > before


def test_an_aborted_stream_gives_its_slots_back(client: OpenAI, server: Server) -> None:
    def running() -> tuple[float, float]:
        values = server.read_metrics()
        return values["flashmemory:resident_blocks"], values["flashmemory:total_blocks"]

    def is_sparse() -> bool:
        resident, total = running()
        return 0.1 * total < resident < 0.14 * total

    stopped, served = make_questions("multikey", 2 * NUM_TOKENS, 2, seed=60)
    stream = client.completions.create(
        model=MODEL_NAME,
        prompt=stopped.prompt,
        max_tokens=20_000,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for _ in range(40):
        next(stream)
    # The gauges may be a quarter of a second old: from before the first selection, on a fast machine
    assert wait_until(is_sparse)
    stream.close()
    assert wait_until(lambda: running() == (0.0, 0.0))
    assert complete(client, served) == served.answer


def test_a_prompt_that_is_too_long_is_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model=MODEL_NAME, prompt=[5] * 40_000, max_tokens=1)
    assert refused.value.status_code == 400
    assert "maximum context length is 33792" in str(refused.value)
    assert "40000" in str(refused.value)
