"""Pictures compare only what was measured alike, and show every sweep that the rows hold."""

from pathlib import Path
from typing import Any

import pytest

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.accuracy_plot import MEAN, SWEEPS, curves, plot_rows, rows_by_selector, rows_of_sweep
from flashmemory_vllm.evaluation.accuracy_rows import AccuracyRow
from tests.unit.evaluation.rows import make_row

SWEEP = {sweep.name: sweep for sweep in SWEEPS}
TASKS = ("multikey", "late")


def rows_at(field: str, values: tuple[Any, ...], **changes: Any) -> list[AccuracyRow]:
    return [make_row(task=task, **{field: value}, **changes) for task in TASKS for value in values]


RATIOS = rows_at("ratio", (0.05, 0.125, 0.5)) + rows_at("ratio", (0.05, 0.125, 0.5), selector="h2o", accuracy=0.25)


def test_a_sweep_holds_all_else_fixed() -> None:
    other = rows_at("ratio", (0.05, 0.2), tau=64) + rows_at("ratio", (0.05, 0.125), tokens=1200)
    assert rows_of_sweep(other + RATIOS, SWEEP["ratio"]) == RATIOS
    assert rows_of_sweep(RATIOS, SWEEP["tau"]) == []


def test_selectors_at_the_same_bytes_are_compared_whatever_ratio_that_leaves_them() -> None:
    shares = ((0.1, 0.1, "streaming"), (0.4, 0.4, "streaming"), (0.3, 0.35, "neural"), (0.4, 0.45, "neural"))
    rows = [make_row(ratio=ratio, device_share=share, selector=name) for ratio, share, name in shares]
    assert rows_of_sweep([*rows, make_row()], SWEEP["bytes"]) == rows
    assert rows_of_sweep(rows, SWEEP["ratio"]) == []
    alike = [make_row(selector=name, ratio=ratio, device_share=0.4) for name, ratio in (("exact", 0.1), ("h2o", 0.3))]
    assert rows_by_selector([*alike, make_row()]) == alike


def test_a_single_value_of_another_selector_is_no_curve() -> None:
    assert rows_of_sweep([*RATIOS, make_row(selector="mean")], SWEEP["ratio"]) == RATIOS


@pytest.mark.parametrize(
    ("name", "field", "values", "places"),
    [
        ("tau", "tau", (1, 64), {1, 64}),
        ("context", "tokens", (1024, 4096), {1024, 4096}),
        ("batch", "batch", (1, 16), {1, 16}),
        ("groups", "groups", (1, 3), {1, 3}),
        ("anchors", "anchors", ((1,), (0, 1, 2)), {1, 3}),
    ],
)
def test_each_sweep_is_found(name: str, field: str, values: tuple[Any, ...], places: set[int]) -> None:
    found = rows_of_sweep([*rows_at(field, values), make_row(tau=7, tokens=7, groups=7)], SWEEP[name])
    assert {SWEEP[name].value(row) for row in found} == places


def test_rows_that_do_not_say_what_is_swept_are_left_out() -> None:
    rows = rows_at("anchors", (None, (1,), (0, 1)))
    assert len(rows_of_sweep(rows, SWEEP["anchors"])) == 4
    assert rows_of_sweep(rows_at("batch", (None, 1)), SWEEP["batch"]) == []


def test_curves_are_those_of_the_rows_and_the_mean_leaves_out_unfinished_values() -> None:
    rows = [row for row in RATIOS if (row.selector, row.task, row.ratio) != ("h2o", "late", 0.5)]
    panels = curves(rows, SWEEP["ratio"])
    assert list(panels) == [*TASKS, MEAN]
    assert panels["multikey"]["h2o"] == {0.05: 0.25, 0.125: 0.25, 0.5: 0.25}
    assert panels[MEAN]["h2o"] == {0.05: 0.25, 0.125: 0.25}
    assert panels[MEAN]["full"] == {0.05: 1.0, 0.125: 1.0, 0.5: 1.0}


def test_a_single_task_has_no_mean() -> None:
    assert list(curves([row for row in RATIOS if row.task == "late"], SWEEP["ratio"])) == ["late"]


def test_indexers_are_told_apart_unless_the_axis_does() -> None:
    taus = [row for name in "ab" for row in rows_at("tau", (1, 64), selector="neural", indexer=name)]
    assert set(curves(taus, SWEEP["tau"])["late"]) == {"full", "neural a", "neural b"}
    anchors = [make_row(selector="neural", indexer="ab"[count - 1], anchors=tuple(range(count))) for count in (1, 2)]
    assert set(curves(anchors, SWEEP["anchors"])["multikey"]) == {"full", "neural"}


def test_selectors_are_compared_where_most_of_them_were_measured() -> None:
    alike = [make_row(selector=name, tokens=tokens) for name in ("exact", "h2o", "mean") for tokens in (600, 1200)]
    assert rows_by_selector([*RATIOS, *(alike), make_row(questions=300)]) == [
        row for row in [*RATIOS, *alike] if row.task in TASKS and row.ratio == 0.125
    ]


def test_a_picture_is_drawn_for_every_sweep(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = RATIOS + rows_at("tau", (1, 64, 256)) + rows_at("batch", (1, 4))
    paths = plot_rows([make_row(selector="full"), *rows], tmp_path / "new")
    assert [path.name for path in paths] == ["ratio.png", "tau.png", "batch.png", "selectors.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_says_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    plot_rows(RATIOS, tmp_path)
    sweep = drawn[0]
    assert sweep.get_suptitle() == "600 tokens, tau 16, one layer group, 12 questions a cell, batch 64, a device"
    panels = {axis.get_title(loc="left"): axis for axis in sweep.axes if axis.get_visible()}
    lines = {line.get_label(): line for line in panels["late"].get_lines()}
    assert list(lines) == ["full", "exact", "h2o"]
    assert list(lines["h2o"].get_ydata()) == [0.25, 0.25, 0.25]
    assert [tick.get_text() for tick in panels["late"].get_xticklabels()] == ["0.05", "0.125", "0.5"]


def test_rows_of_dense_attention_alone_make_no_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="no rows but of dense attention"):
        plot_rows([make_row(selector="full"), make_row(accuracy=None)], tmp_path)
