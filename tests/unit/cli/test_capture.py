"""`flashmemory capture` refuses what it cannot record, and starts an engine that every prompt fits in."""

import argparse
from pathlib import Path

import pytest

from flashmemory_vllm.capture.prompts import Prompt
from flashmemory_vllm.capture.writer import CaptureWriter, ModelShape
from flashmemory_vllm.cli import app
from flashmemory_vllm.cli.capture import FIRST_LOOK, check, engine_arguments, first_look, make_meta, make_prompts
from flashmemory_vllm.errors import ConfigError

SHAPE = ModelShape(6, 4, 2, 64, 16, (2, 3, 4), 0.125, "bfloat16")
PROMPTS = [Prompt((1,) * 100, 50, 0), Prompt((1,) * 120, 20, 1)]


def parse(*arguments: str) -> argparse.Namespace:
    return app.build_parser().parse_args(["capture", "--out", "data", *arguments])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--documents", "0"), "--documents is 0"),
        (("--max-output-tokens", "0"), "--max-output-tokens is 0"),
        (("--every", "-1"), "--every is -1"),
        (("--delay", "-1"), "--delay is -1"),
        (("--chunk-size", "5"), "--chunk-size is 5: allowed is what divides"),
        (("--query-window", "0"), "--query-window is 0"),
        (("--max-gib", "nan"), "--max-gib is nan"),
        (("--prompts", "p.jsonl", "--accuracy-questions", "3"), "--accuracy-questions: given with --prompts"),
        (("--prompts", "p.jsonl", "--texts", "t.txt"), "--texts: given with --prompts"),
    ],
)
def test_what_cannot_be_recorded_is_refused(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        check(parse(*arguments))
    assert said in str(refusal.value)


def test_defaults_are_allowed() -> None:
    check(parse())


def test_room_for_the_longest_prompt_with_its_answer() -> None:
    arguments = engine_arguments(parse("--batch", "3", "--gpu-memory-bytes", "1024"), PROMPTS)
    assert (arguments["max_model_len"], arguments["max_num_seqs"]) == (150, 3)
    assert arguments["kv_cache_memory_bytes"] == 1024
    assert "kv_cache_memory_bytes" not in engine_arguments(parse(), PROMPTS)


def test_meta_of_a_capture() -> None:
    meta = make_meta(parse("--every", "2", "--commit", "c", "--model", "org/name"), SHAPE, "qwen3", PROMPTS)
    assert (meta.model, meta.window, meta.delay) == ("org/name", 16, 1)
    assert (meta.provenance["every"], meta.provenance["layer_mass"], meta.provenance["commit"]) == (2, False, "c")


def test_anchors_are_chosen_from_the_longer_prompts() -> None:
    prompts = [Prompt((1,) * (length * (1 + turn % 2)), 5, 0) for turn in range(12) for length in (100, 210)]
    looked_at = first_look(prompts)
    assert len(looked_at) == 6 < FIRST_LOOK
    assert {len(prompt.ids) for prompt in looked_at} == {420}
    assert first_look(prompts * 2) == looked_at + looked_at[:2]


def finished(folder: Path, *arguments: str) -> list[str]:
    """A complete capture of a few short prompts of the shipped model; the words of its command."""
    words = ["capture", "--out", str(folder), "--documents", "4", "--tokens", "1024", "--block-size", "32", *arguments]
    args = app.build_parser().parse_args(words)
    shape = ModelShape(6, 4, 2, 64, 32, (2, 3, 4), 0.125, "float32")
    prompts, _ = make_prompts(args)
    args.commit = "c"
    CaptureWriter(folder, make_meta(args, shape, "qwen3", prompts), 1 << 30).finish()
    return words


def test_a_complete_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = finished(tmp_path)
    assert app.main(words) == 0
    assert app.main([*words, "--anchor-layers", "2", "3", "4"]) == 0
    assert capsys.readouterr().out == f"{tmp_path} is complete\n" * 2


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        (("--documents", "5"), "prompts"),
        (("--anchor-layers", "1"), "anchor_layers"),
        (("--layer-mass", "--every", "2"), "every, layer_mass"),
        (("--block-size", "64"), "block_size"),
    ],
)
def test_a_complete_folder_of_another_capture_is_no_answer(
    changes: tuple[str, ...], differing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main([*finished(tmp_path), *changes]) == 2
    assert f"holds another capture, which differs in {differing}; allowed is another" in capsys.readouterr().err


def test_a_complete_folder_that_does_not_say_of_what_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = finished(tmp_path)
    for content in ("{}", "[", None):
        (tmp_path / "meta.json").unlink() if content is None else (tmp_path / "meta.json").write_text(content)
        assert app.main(words) == 2
        assert "meta.json does not say what was recorded" in capsys.readouterr().err
