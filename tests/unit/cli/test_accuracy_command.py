"""`flashmemory accuracy` refuses what it cannot measure, and starts engines that every cell fits in."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from flashmemory_vllm.capture.prompts import prompt_digest
from flashmemory_vllm.cli.accuracy import check_recorded, make_cells, make_starts, run
from flashmemory_vllm.cli.accuracy_starts import Start
from flashmemory_vllm.cli.app import build_parser
from flashmemory_vllm.cli.block_size import block_size_of
from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.accuracy import Conditions
from flashmemory_vllm.evaluation.accuracy_rows import Setting, save_rows
from flashmemory_vllm.evaluation.tasks import TASK_NAMES
from flashmemory_vllm.plugin.recorded_prompts import RecordedPrompts
from tests.unit.evaluation.rows import make_row

PLAN = """
why: to see what is split
cells:
  - {selectors: [full, h2o, streaming], tokens: [1024, 4096], tasks: [multikey, late], batches: [8], ratios: [0.2]}
  - {selectors: [h2o], tokens: [1024], tasks: [multikey], batches: [2], anchor_layers: [[1], [2, 3, 4]]}
  - {selectors: [exact], tokens: [1024], tasks: [multikey], batches: [2]}
  - {selectors: [oracle], tokens: [1024], tasks: [multikey], groups: [1, 3]}
"""


def parse(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(["accuracy", "--out", "rows.json", *arguments])


def starts(*arguments: str) -> list[Start]:
    args = parse(*arguments)
    return make_starts(args, make_cells(args))


def test_every_setting_is_one_that_our_configuration_allows() -> None:
    given = ("--ratio", "0.2", "--tau", "64", "--groups", "2", "--anchor-layers", "5,0", "--score-threshold", "0.1")
    settings = {cell.setting for cell in make_cells(parse(*given))}
    assert {setting.anchors for setting in settings} == {None, (0, 5)}
    assert {setting.score_threshold for setting in settings} == {None, 0.1}
    for setting in settings:
        FlashMemoryConfig.model_validate(setting.all_options())
    for start in starts(*given):
        FlashMemoryConfig.model_validate(start.options)


def test_what_is_not_given_has_its_default() -> None:
    cells = make_cells(parse())
    assert {cell.setting for cell in cells} == {
        Setting("full", 16, 1.0, 1),
        *(Setting(name, 16, 0.135, 1) for name in ("streaming", "random", "mean", "bounds", "h2o")),
        Setting("exact", 4, 0.135, 1),
    }
    assert {(cell.tokens, cell.questions, cell.batch) for cell in cells} == {
        (tokens, 200, 64) for tokens in (4096, 16384, 32768)
    }


def test_a_device_share_leaves_each_selector_what_its_index_does_not_take() -> None:
    args = parse("--device-share", "0.4", "--selectors", "full,streaming,bounds,exact", "--dtype", "float32")
    cells = {cell.setting.selector: cell.setting for cell in make_cells(args)}
    ratios = {name: setting.ratio for name, setting in cells.items()}
    # Three of six layers: of each block all keys, in a byte instead of four and with a scale, or two vectors a KV head
    block_size = block_size_of(args)
    exact = 0.4 - 1 / 16 - 1 / (256 * block_size)
    assert ratios == pytest.approx({"full": 1.0, "streaming": 0.4, "bounds": 0.4 - 0.5 / block_size, "exact": exact})
    assert {setting.device_share for name, setting in cells.items() if name != "full"} == {0.4}


def test_a_fallback_is_set_where_it_is_asked_for() -> None:
    cells = make_cells(parse("--fallback-share", "0.3", "--score-threshold", "0.1", "--selectors", "full,h2o"))
    assert {(cell.setting.selector, cell.setting.fallback_share) for cell in cells} == {("full", None), ("h2o", 0.3)}


def test_every_task_can_be_asked_for_and_the_trained_ones_are_the_default() -> None:
    (start,) = starts("--selectors", "h2o", "--tasks", "path,latepath", "--tokens", "2048")
    assert start.engine["max_model_len"] == 2048 + 144 + 2 + 32
    assert {cell.task for cell in make_cells(parse())} == set(TASK_NAMES)


def test_an_indexer_goes_to_the_selector_that_takes_one() -> None:
    args = parse("--selectors", "neural,h2o", "--indexer", "owner/indexer")
    assert {(cell.setting.selector, cell.setting.indexer) for cell in make_cells(args)} == {
        ("neural", "owner/indexer"),
        ("h2o", None),
    }


def test_the_engine_starts_with_the_largest_ratio_and_the_largest_index() -> None:
    (dense,) = starts("--selectors", "streaming,mean,h2o,full")
    assert (dense.options["selector"], dense.options["resident_ratio"]) == ("h2o", 1.0)
    (sparse,) = starts("--selectors", "streaming", "--host-memory-gib", "2")
    assert (sparse.options["selector"], sparse.options["resident_ratio"]) == ("streaming", 0.135)
    assert sparse.options["host_memory_gib"] == 2.0
    assert sparse.engine["enforce_eager"] is False


def test_the_longest_answer_fits_behind_the_longest_prompt() -> None:
    sizes = ("--tokens", "512, 4096", "--gpu-memory-bytes", "1024", "--batch", "7")
    (start,) = starts("--selectors", "h2o", "--tasks", "multikey,late", *sizes)
    assert (start.engine["max_model_len"], start.engine["max_num_seqs"]) == (4096 + 150, 7)
    assert start.engine["kv_cache_memory_bytes"] == 1024


def test_cells_that_captured_graphs_cannot_serve_share_an_engine_without(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN)
    graphs, eager = starts("--plan", str(plan))
    assert (graphs.engine["enforce_eager"], eager.engine["enforce_eager"]) == (False, True)
    assert {(cell.setting.anchors, cell.setting.groups) for cell in graphs.cells} == {(None, 1), ((2, 3, 4), 1)}
    assert {(cell.setting.selector, cell.setting.anchors, cell.setting.groups) for cell in eager.cells} == {
        ("h2o", (1,), 1),
        # Its memory reads the queries of all tokens
        ("exact", None, 1),
        ("oracle", None, 3),
    }
    assert (graphs.engine["max_model_len"], eager.engine["max_model_len"]) == (4096 + 150, 1024 + 4)
    (both,) = starts("--plan", str(plan), "--eager")
    assert set(both.cells) == {*graphs.cells, *eager.cells}
    assert both.engine["enforce_eager"] is True
    assert both.options["selector"] == "h2o"


def test_no_engine_starts_where_all_is_measured() -> None:
    assert make_starts(parse(), []) == []


def test_a_model_that_does_not_fit_is_refused_before_an_engine_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it has no config\.json"):
        starts("--model", str(tmp_path))
    with pytest.raises(ConfigError, match=r"layer_groups: 7 given, allowed: 1 to 6"):
        starts("--groups", "7")
    with pytest.raises(ConfigError, match="allowed is a file, a folder"):
        starts("--selectors", "neural", "--indexer", str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--selectors", "exact,best"), "--selectors has 'best': allowed is full, "),
        (("--selectors", "neural"), "--indexer is None"),
        (("--selectors", "h2o", "--indexer", "x"), "--indexer is 'x'"),
        (("--tasks", "multikey,riddle"), "--tasks has 'riddle': allowed is multikey, "),
        (("--tokens", "4k"), "--tokens is '4k'"),
        (("--tokens", "0,4096"), "--tokens is '0,4096'"),
        (("--anchor-layers", "-1"), "--anchor-layers is '-1'"),
        (("--questions", "0"), "--questions is 0"),
        (("--batch", "0"), "--batch is 0"),
        (("--ratio", "1.5"), "--ratio is 1.5"),
        (("--score-threshold", "-1"), "--score-threshold is -1.0"),
        (("--device-share", "0"), "--device-share is 0.0"),
        (("--device-share", "0.4", "--ratio", "0.2"), "--device-share is 0.4: given with --ratio"),
        (("--fallback-share", "1.5"), "--fallback-share is 1.5"),
        (("--fallback-share", "0.3"), "allowed is --score-threshold beside it, or the selector neural alone"),
        (("--questions-per-context", "-1"), "--questions-per-context is -1"),
        (("--plan", "plan.yaml", "--tau", "4", "--batch", "2"), "--tau, --batch: given with --plan"),
        (("--plan", "none.yaml"), "--plan: none.yaml cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        make_cells(parse(*arguments))
    assert said in str(refusal.value)


def test_a_time_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="--time-limit is 0"):
        run(parse("--time-limit", "0"))


def test_rows_are_shown_and_drawn_without_an_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = tmp_path / "rows.json"
    save_rows(rows, [make_row(ratio=ratio) for ratio in (0.1, 0.2)])
    args = build_parser().parse_args(["accuracy", "--out", str(rows), "--table", "--plot", str(tmp_path / "new")])
    assert run(args) == 0
    said = capsys.readouterr().out
    assert "## toy: 12 questions a cell" in said
    assert said.splitlines()[-2:] == [str(tmp_path / "new" / name) for name in ("ratio.png", "selectors.png")]


ORACLE = parse("--selectors", "oracle", "--tasks", "multikey,late", "--tokens", "700,1024", "--questions", "3")
CONDITIONS = Conditions("model", 16)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[tuple[str, int]]], None]:
    """Make captures seem to hold the three questions of tasks at lengths, in blocks of 16 tokens."""

    def record(questions: Sequence[tuple[str, int]]) -> None:
        samples = [
            sample
            for cell in make_cells(ORACLE)
            if (cell.task, cell.tokens) in questions
            for sample in CONDITIONS.samples(cell.task, cell.tokens, cell.questions)
        ]
        place = (Path("shard"), 0)
        future = RecordedPrompts(16, {prompt_digest(sample.prompt_ids.tolist()): place for sample in samples})
        monkeypatch.setattr(RecordedPrompts, "load_all", lambda _: future)

    return record


Record = Callable[[Sequence[tuple[str, int]]], None]
EVERYTHING = [(task, tokens) for task in ("multikey", "late") for tokens in (700, 1024)]


def test_the_oracle_is_asked_what_was_recorded(recorded: Record) -> None:
    recorded(EVERYTHING)
    check_recorded(make_cells(ORACLE), CONDITIONS, [Path("data")])
    with pytest.raises(ConfigError, match="recorded in blocks of 16 tokens, --block-size is 32"):
        check_recorded(make_cells(ORACLE), Conditions("model", 32), [Path("data")])


def test_what_was_not_recorded_is_named_with_the_command_that_records_it(recorded: Record) -> None:
    recorded([("multikey", 700), ("late", 700), ("multikey", 1024)])
    with pytest.raises(ConfigError) as refusal:
        check_recorded(make_cells(ORACLE), CONDITIONS, [Path("data")])
    assert "not recorded are 3 questions of late at 1,024 tokens; " in str(refusal.value)
    command = str(refusal.value).rpartition(": ")[2].split()
    assert command[0] == "flashmemory"
    args = build_parser().parse_args(command[1:])
    assert (args.accuracy_questions, args.tokens, args.block_size, args.layer_mass) == (3, 1024, 16, True)


def test_an_oracle_without_data_is_refused_and_other_selectors_need_none() -> None:
    with pytest.raises(ConfigError, match="multikey, late at 700 tokens; 3 questions of multikey, late at 1,024"):
        check_recorded(make_cells(ORACLE), CONDITIONS, [])
    check_recorded(make_cells(parse("--tokens", "700")), CONDITIONS, [])


def test_captures_of_different_blocks_are_not_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"a": 16, "b": 32}
    monkeypatch.setattr(RecordedPrompts, "load", lambda folder: RecordedPrompts(sizes[folder.name], {}))
    with pytest.raises(ConfigError, match="blocks of 16 and 32 tokens"):
        RecordedPrompts.load_all([Path("a"), Path("b")])
