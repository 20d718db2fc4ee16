"""LongBench v2 against a server that answers by rule."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flashmemory_vllm.errors import ConfigError, FlashMemoryError
from flashmemory_vllm.evaluation.longbench import MARGIN_TOKENS, LongBenchOptions, run_longbench
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.evaluation.vocabulary import decode
from flashmemory_vllm.reference import reference_model_path
from tests.unit.evaluation.fake_server import MAX_MODEL_LEN, MODEL, FakeServer
from tests.unit.evaluation.test_longbench_questions import ITEM

TOKENIZER = str(reference_model_path())
# The reference model's tokenizer has no other words, and a prompt that is cut comes back from its tokens
THIRD = decode([20])
OPTIONS = LongBenchOptions(provenance=Provenance("command", "commit", "gpu", {"python": "3"}))
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Three questions; the last does not fit into 1,000 tokens."""
    path = tmp_path / "questions.json"
    contexts = ["first", "second", f"{THIRD} " * 2000]
    items = [ITEM | {"_id": f"q{index}", "context": context} for index, context in enumerate(contexts)]
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


def by_context(prompt: str) -> str:
    """Right, wrong, and unreadable."""
    if "first" in prompt:
        return "The correct answer is (B)"
    return "The correct answer is (A)" if "second" in prompt else "I cannot tell"


def failing(word: str) -> Callable[[str], str]:
    def answer(prompt: str) -> str:
        if word in prompt:
            raise ValueError("out of order")
        return by_context(prompt)

    return answer


@pytest.mark.parametrize(("chat", "path"), [(True, CHAT), (False, COMPLETIONS)])
def test_answers_are_counted_over_both_apis(chat: bool, path: str, questions: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, chat=chat)
    with FakeServer(by_context) as server:
        rows = run_longbench(server.url, MODEL, TOKENIZER, questions, tmp_path / "out", 1000, options)
    assert [(row["task"], row["questions"]) for row in rows] == [("all", 3), ("easy", 3), ("short", 3)]
    assert rows[0]["accuracy"] == pytest.approx(1 / 3)
    assert (rows[0]["unparsable"], rows[0]["truncated"], rows[0]["tokens"]) == (1, 1, 1000)
    assert (rows[0]["suite"], rows[0]["model"], rows[0]["commit"]) == ("longbench-v2", MODEL, "commit")
    assert [request_path for request_path, _ in server.requests] == [path] * 3
    body = server.requests[0][1]
    assert (body["temperature"], body["max_tokens"]) == (0.1, 128)


def test_what_is_answered_is_not_asked_again(questions: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "out"
    one_by_one = replace(OPTIONS, num_concurrent=1)
    with FakeServer(failing(THIRD)) as server, pytest.raises(FlashMemoryError, match="out of order"):
        run_longbench(server.url, MODEL, TOKENIZER, questions, out_dir, 1000, one_by_one)
    # As if the run had been killed while it wrote
    (answers,) = out_dir.glob("*.jsonl")
    with answers.open("a", encoding="utf-8") as file:
        file.write('{"id": "q2", "cho')
    with FakeServer(by_context) as server:
        first = run_longbench(server.url, MODEL, TOKENIZER, questions, out_dir, 1000, OPTIONS)
        assert [THIRD in body["messages"][0]["content"] for _, body in server.requests] == [True]
        again = run_longbench(f"{server.url}/v1", MODEL, TOKENIZER, questions, out_dir, 1000, OPTIONS)
        assert len(server.requests) == 1
    assert again == first
    assert first[0]["accuracy"] == pytest.approx(1 / 3)


def test_other_settings_ask_anew(questions: Path, tmp_path: Path) -> None:
    with FakeServer(by_context) as server:
        for temperature in (0.1, 0.0):
            options = replace(OPTIONS, temperature=temperature, limit=1)
            rows = run_longbench(server.url, MODEL, TOKENIZER, questions, tmp_path / "out", 1000, options)
            assert (rows[0]["questions"], rows[0]["accuracy"]) == (1, 1.0)
        assert [body["temperature"] for _, body in server.requests] == [0.1, 0.0]
        # More of the same questions: the first has its answer
        run_longbench(server.url, MODEL, TOKENIZER, questions, tmp_path / "out", 1000, OPTIONS)
        assert len(server.requests) == 4
    rows_of_all = json.loads((tmp_path / "out" / "longbench-v2.json").read_text(encoding="utf-8"))
    assert [row["questions"] for row in rows_of_all if row["task"] == "all"] == [1, 1, 3]


def test_prompts_fill_what_the_server_takes(questions: Path, tmp_path: Path) -> None:
    with FakeServer(by_context) as server:
        rows = run_longbench(server.url, MODEL, TOKENIZER, questions, tmp_path / "out", options=OPTIONS)
    assert rows[0]["tokens"] == MAX_MODEL_LEN - 128 - MARGIN_TOKENS
    assert rows[0]["truncated"] == 0


@pytest.mark.parametrize(
    ("max_tokens", "options", "said"),
    [
        (MAX_MODEL_LEN, OPTIONS, f"max_tokens is {MAX_MODEL_LEN}: allowed is 2 to 7808"),
        (1, OPTIONS, "max_tokens is 1: "),
        (1000, replace(OPTIONS, limit=0), "limit is 0: allowed is 1 or more"),
        (1000, replace(OPTIONS, temperature=-1.0), "temperature is -1.0: allowed is 0 or more"),
    ],
)
def test_bad_arguments_are_refused(
    max_tokens: int, options: LongBenchOptions, said: str, questions: Path, tmp_path: Path
) -> None:
    with FakeServer(by_context) as server, pytest.raises(ConfigError, match=said):
        run_longbench(server.url, MODEL, TOKENIZER, questions, tmp_path / "out", max_tokens, options)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_nowhere_is_refused(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with FakeServer(by_context) as server, pytest.raises(ConfigError, match="tokenizer is '/absent'"):
        run_longbench(server.url, MODEL, "/absent", questions, tmp_path / "out", 1000, OPTIONS)
