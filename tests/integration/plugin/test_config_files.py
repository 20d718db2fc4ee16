"""Every file in `configs/` goes through vLLM's parser of `vllm serve --config`, through our schema, and is planned."""

import argparse
from pathlib import Path

import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from flashmemory_vllm.cli.plan import model_sizes
from flashmemory_vllm.cli.plan_layers import layer_kinds
from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.runtime.forecast import ServerSizes, forecast
from tests.helpers.published import published_fields

FILES = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    """What `vllm serve` parses its arguments with."""
    main = FlexibleArgumentParser(prog="vllm")
    serve = main.add_subparsers(dest="command").add_parser("serve")
    make_arg_parser(serve)
    return main


GIB = 1 << 30
HYBRIDS = {"gemma-3-27b", "gpt-oss-120b", "gpt-oss-20b", "nemotron-3-nano", "qwen3-next-80b", "qwen3.5-27b"}
# GiB that the weights leave for KV on each GPU that a file is for
ROOM = {
    "gemma-3-27b": 17,
    "gpt-oss-120b": 55,
    "gpt-oss-20b": 55,
    "llama-3.1-70b": 32,
    "llama-3.1-8b": 50,
    "mistral-7b": 15,
    "nemotron-3-nano": 10,
    "qwen3-32b": 8,
    "qwen3-8b": 15,
    "qwen3-next-80b": 38,
    "qwen3.5-27b": 17,
}


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


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "reference"], ids=lambda path: path.stem)
def test_what_a_file_asks_for_fits(path: Path, parser: FlexibleArgumentParser) -> None:
    """With host memory for the longest request in each place, and room for prefixes beside them."""
    args = _parse(parser, "--config", str(path))
    fields = published_fields(path.stem)
    model = model_sizes(fields, "auto", kinds=layer_kinds(fields, args.max_model_len))
    block_size, num_ranks = 16, args.tensor_parallel_size
    host_gib = args.max_num_seqs * model.shape(block_size).block_bytes * (args.max_model_len // block_size + 1) / GIB
    server = ServerSizes(
        device_bytes=ROOM[path.stem] * GIB,
        context_tokens=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens or 8192,
        block_size=block_size,
        tensor_parallel_size=num_ranks,
    )
    config = FlashMemoryConfig.from_additional_config(
        {"flashmemory": args.additional_config["flashmemory"] | {"host_memory_gib": host_gib + 1}}
    )
    made = forecast(model, config, server)
    assert made.num_requests > made.dense_num_requests
    assert (made.native is None) == (path.stem not in HYBRIDS)
    if made.native is not None:
        assert made.limited_by != "windows and states"
        assert made.kept_prefixes(args.max_num_seqs) >= 4
