"""Every file in `configs/` goes through vLLM's own parser of `vllm serve --config` and through our schema."""

import argparse
from pathlib import Path

import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from flashmemory_vllm.config import FlashMemoryConfig

FILES = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    """What `vllm serve` parses its arguments with."""
    main = FlexibleArgumentParser(prog="vllm")
    serve = main.add_subparsers(dest="command").add_parser("serve")
    make_arg_parser(serve)
    return main


def _parse(parser: FlexibleArgumentParser, *arguments: str) -> argparse.Namespace:
    args: argparse.Namespace = parser.parse_args(["serve", *arguments])
    return args


def _model(path: Path) -> list[str]:
    """The reference model's folder differs between installations: its file names no model."""
    return ["some-model"] if path.stem == "reference" else []


def test_there_are_files() -> None:
    assert {path.stem for path in FILES} >= {"reference", "llama-3.1-8b", "qwen3-8b", "mistral-7b"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_is_loaded_and_selects_our_backend(path: Path, parser: FlexibleArgumentParser) -> None:
    args = _parse(parser, *_model(path), "--config", str(path))
    assert args.attention_backend.lower() == "flashmemory"
    assert args.model_tag or args.model
    config = FlashMemoryConfig.from_additional_config(args.additional_config)
    assert config.resident_ratio == 0.135


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_command_line_wins_over_file(path: Path, parser: FlexibleArgumentParser) -> None:
    given = ["--max-num-seqs", "3", "--additional-config", '{"flashmemory": {"tau_steps": 5}}']
    args = _parse(parser, *_model(path), "--config", str(path), *given)
    assert args.max_num_seqs == 3
    assert FlashMemoryConfig.from_additional_config(args.additional_config).tau_steps == 5


def test_one_option_can_be_given_on_its_own(parser: FlexibleArgumentParser) -> None:
    args = _parse(parser, "some-model", "--additional-config.flashmemory.resident_ratio", "0.2")
    assert FlashMemoryConfig.from_additional_config(args.additional_config).resident_ratio == 0.2
