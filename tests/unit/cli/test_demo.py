"""The demo's parts that need no server: its question, its arithmetic, its verdict."""

from pathlib import Path

import pytest

from flashmemory_vllm.cli.demo import Question, Residency, make_question, measure, report
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.vocabulary import decode, encode

QUESTION = Question(prompt_ids=[1], text="ASK kuto bibi", answer="dalet gonis kupar", num_needles=200)
RESIDENCY = Residency(ratio=0.25, num_blocks=512, num_slots=128)


def test_the_prompt_hides_the_answer_among_a_hundred_needles() -> None:
    question = make_question(num_tokens=16384, seed=0)
    prompt = decode(question.prompt_ids)
    key = " ".join(question.text.split()[1:3])
    assert len(question.prompt_ids) == 16384
    assert question.num_needles >= 100
    assert prompt.count(f"NEEDLE {key} {question.answer} .") == 1
    assert prompt.endswith(question.text)
    assert encode(prompt) == question.prompt_ids


def test_another_seed_asks_another_question() -> None:
    assert make_question(2048, seed=0) != make_question(2048, seed=1)


def test_residency_comes_from_what_the_counters_grew_by() -> None:
    before = {
        "flashmemory:decode_resident_blocks_total": 100.0,
        "flashmemory:decode_context_blocks_total": 100.0,
        "flashmemory:slots_total": 128.0,
    }
    after = {
        "flashmemory:decode_resident_blocks_total": 220.0,
        "flashmemory:decode_context_blocks_total": 1300.0,
        "flashmemory:slots_total": 128.0,
    }
    assert measure(before, after, num_blocks=512) == Residency(ratio=0.1, num_blocks=512, num_slots=129)


def test_a_server_without_our_backend_is_told() -> None:
    with pytest.raises(ConfigError, match="--attention-backend flashmemory"):
        measure({}, {}, num_blocks=512)


def test_a_right_answer_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(QUESTION, " dalet gonis kupar ", RESIDENCY) == 0
    printed = capsys.readouterr().out
    assert "128 of 512 blocks: 25.0%" in printed
    assert "128 slots: 4.0 times smaller" in printed


def test_a_wrong_answer_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(QUESTION, "dalet gonis", RESIDENCY) == 1
    assert "NOT the same" in capsys.readouterr().out


def test_missing_files_are_told_before_a_server_starts(tmp_path: Path) -> None:
    from flashmemory_vllm.cli.server import Server

    with pytest.raises(ConfigError, match="does not exist"):
        Server(tmp_path, tmp_path / "absent.yaml", startup_seconds=1)
