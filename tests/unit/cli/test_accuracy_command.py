"""`flashmemory accuracy` refuses what it cannot measure, and starts an engine that every cell fits in."""

import argparse

import pytest

from flashmemory_vllm.cli.accuracy import engine_arguments, make_plan, start_options
from flashmemory_vllm.cli.app import build_parser
from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError


def parse(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(["accuracy", "--out", "rows.json", *arguments])


def test_every_setting_is_one_that_our_configuration_allows() -> None:
    args = parse("--ratio", "0.2", "--tau", "64", "--groups", "2", "--anchor-layers", "2,0")
    assert {setting.anchors for setting in make_plan(args).settings} == {None, (0, 2)}
    for setting in make_plan(args).settings:
        FlashMemoryConfig.model_validate(setting.options())
    FlashMemoryConfig.model_validate(start_options(args, make_plan(args)))


def test_an_indexer_goes_to_the_selector_that_takes_one() -> None:
    args = parse("--selectors", "neural,h2o", "--indexer", "owner/indexer", "--anchor-layers", "1")
    assert {(one.selector, one.indexer, one.anchors) for one in make_plan(args).settings} == {
        ("neural", "owner/indexer", None),
        ("h2o", None, (1,)),
    }


def test_the_engine_starts_with_the_largest_ratio_and_the_largest_index() -> None:
    dense = parse("--selectors", "streaming,exact,full")
    options = start_options(dense, make_plan(dense))
    assert (options["selector"], options["resident_ratio"]) == ("exact", 1.0)
    sparse = parse("--selectors", "streaming", "--host-memory-gib", "2")
    options = start_options(sparse, make_plan(sparse))
    assert (options["selector"], options["resident_ratio"]) == ("streaming", 0.135)
    assert options["host_memory_gib"] == 2.0


def test_the_longest_answer_fits_behind_the_longest_prompt() -> None:
    args = parse("--tasks", "multikey,late", "--tokens", "512, 4096", "--gpu-memory-bytes", "1024")
    arguments = engine_arguments(args, make_plan(args))
    assert arguments["max_model_len"] == 4096 + 150
    assert arguments["kv_cache_memory_bytes"] == 1024


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--selectors", "exact,oracle"), "--selectors has 'oracle': allowed is full, "),
        (("--selectors", "neural"), "--indexer is None"),
        (("--selectors", "h2o", "--indexer", "x"), "--indexer is 'x'"),
        (("--tasks", "multikey,riddle"), "--tasks has 'riddle': allowed is multikey, "),
        (("--tokens", "4k"), "--tokens is '4k'"),
        (("--tokens", "0,4096"), "--tokens is '0,4096'"),
        (("--anchor-layers", "-1"), "--anchor-layers is '-1'"),
        (("--questions", "0"), "--questions is 0"),
        (("--questions-per-context", "-1"), "--questions-per-context is -1"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        make_plan(parse(*arguments))
    assert said in str(refusal.value)
