"""Pictures of accuracy rows: each selector by task, and a picture of every sweep that the rows hold."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.accuracy_rows import DENSE, AccuracyRow

COLORS = {
    "full": "#333333",
    "oracle": "#8c8c8c",
    "neural": "#1f6fb2",
    "exact": "#d1802b",
    "h2o": "#4f9d5b",
    "bounds": "#8f63b8",
    "mean": "#c4554d",
    "random": "#c9b458",
    "streaming": "#7fb7c9",
}
MEAN = "mean over the tasks"
MARKERS = "osD^v"
COLUMNS = 3
PANEL_INCHES = (3.6, 2.7)
LEGEND_INCHES = 0.8
BAR_INCHES = 0.17
LEGEND_COLUMNS = 6
DPI = 150

# By line and place on the horizontal axis
Curves = dict[str, dict[float, float]]


@dataclass(frozen=True, slots=True)
class Sweep:
    """One thing that is varied while all others stay.

    Attributes:
        name: of the picture.
        label: of the horizontal axis.
        value: where a row lies on it; None if the row does not say.
        tick: text of such a value.
        field: of `AccuracyRow`, the one that the value is made of.
    """

    name: str
    label: str
    value: Callable[[AccuracyRow], float | None]
    tick: Callable[[float], str]
    field: str


SWEEPS = (
    Sweep("ratio", "resident blocks asked for", lambda row: row.free_ratio, lambda x: f"{x:.3g}", "free_ratio"),
    Sweep("bytes", "device bytes asked for", lambda row: row.device_share, lambda x: f"{x:.3g}", "device_share"),
    Sweep("tau", "decode steps between selections (tau)", lambda row: row.tau, lambda x: f"{x:g}", "tau"),
    Sweep("context", "prompt tokens", lambda row: row.tokens, lambda x: f"{x / 1024:.3g}K", "tokens"),
    Sweep("batch", "requests at once", lambda row: row.batch, lambda x: f"{x:g}", "batch"),
    Sweep("groups", "layer groups", lambda row: row.groups, lambda x: f"{x:g}", "groups"),
    Sweep("anchors", "anchor layers", lambda row: len(row.anchors or ()) or None, lambda x: f"{x:g}", "anchors"),
)
# Whatever is not swept is the same in all of a picture
_CONDITIONS = (
    *("model", "block_size", "questions", "tokens", "free_ratio", "device_share", "tau", "groups", "anchors"),
    *("score_threshold", "fallback_share", "batch", "query_window", "opening_steps"),
)


def plot_rows(rows: Sequence[AccuracyRow], folder: Path) -> list[Path]:
    """Draw `selectors.png`, and `ratio.png`, `tau.png` and so on for the sweeps that the rows hold.

    Where rows hold a sweep under several conditions, the one with most values is drawn.

    Args:
        rows: of any cells.
        folder: where the pictures go.

    Returns:
        The pictures.

    Raises:
        ConfigError: matplotlib is not installed, or there is no row of a sparse setting.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'flashmemory-vllm[bench]'") from None
    sparse = [row for row in rows if row.selector != DENSE and row.accuracy is not None]
    if not sparse:
        raise ConfigError("--plot: there are no rows but of dense attention, allowed are some of another selector")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for sweep in SWEEPS:
        swept = rows_of_sweep(sparse, sweep)
        if swept:
            figure = Figure(layout="constrained")
            _draw_sweep(figure, swept, sweep)
            paths.append(_save(figure, folder / f"{sweep.name}.png"))
    figure = Figure(layout="constrained")
    _draw_selectors(figure, rows_by_selector(sparse))
    return [*paths, _save(figure, folder / "selectors.png")]


def rows_of_sweep(rows: Iterable[AccuracyRow], sweep: Sweep) -> list[AccuracyRow]:
    """Rows that differ in nothing but selector, task and what is swept, of selectors with two values of it or more."""
    groups = _by_conditions((row for row in rows if sweep.value(row) is not None), sweep.field)
    largest = max(groups, key=lambda group: (len(set(map(sweep.value, group))), len(group)), default=[])
    return [row for row in largest if len({sweep.value(o) for o in largest if o.selector == row.selector}) > 1]


def rows_by_selector(rows: Iterable[AccuracyRow]) -> list[AccuracyRow]:
    """Rows of the conditions, at all prompt lengths, under which most selectors were measured."""
    return max(_by_conditions(rows, "tokens"), key=lambda group: (len({row.selector for row in group}), len(group)))


def _by_conditions(rows: Iterable[AccuracyRow], but: str) -> list[list[AccuracyRow]]:
    groups: dict[tuple[object, ...], list[AccuracyRow]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in _CONDITIONS if name != but), []).append(row)
    return list(groups.values())


def curves(rows: Sequence[AccuracyRow], sweep: Sweep) -> dict[str, Curves]:
    """Accuracy by panel, line and value: a panel for each task, and one of the mean where all tasks have a figure.

    Args:
        rows: as `rows_of_sweep` finds them. Dense attention comes with them, as a line of its own.
        sweep: what is swept.
    """
    tasks = list(dict.fromkeys(row.task for row in rows))
    by_task: dict[str, Curves] = {task: {} for task in tasks}
    for row in rows:
        value = sweep.value(row)
        assert value is not None
        figures = {DENSE: row.dense_accuracy, _line(row, rows, sweep.field): row.accuracy}
        for line, accuracy in figures.items():
            if accuracy is not None:
                by_task[row.task].setdefault(line, {})[value] = accuracy
    if len(tasks) == 1:
        return by_task
    mean: Curves = {}
    for line in dict.fromkeys(line for panel in by_task.values() for line in panel):
        of_tasks = [panel.get(line, {}) for panel in by_task.values()]
        everywhere = set(of_tasks[0]).intersection(*of_tasks)
        mean[line] = {value: fmean(one[value] for one in of_tasks) for value in everywhere}
    return {**by_task, MEAN: mean}


def _save(figure: Any, path: Path) -> Path:  # noqa: ANN401 - matplotlib is optional
    figure.savefig(path, dpi=DPI)
    return path


def _line(row: AccuracyRow, rows: Sequence[AccuracyRow], swept: str) -> str:
    """A selector's name; with that of the indexer where there are several that no axis tells apart."""
    several = len({other.indexer for other in rows if other.selector == row.selector}) > 1
    return f"{row.selector} {row.indexer}" if several and swept != "anchors" else row.selector


def _style(line: str, lines: Sequence[str]) -> dict[str, Any]:
    selector = line.partition(" ")[0]
    color = COLORS[selector]
    if selector == DENSE:
        return {"color": color, "linestyle": "--", "linewidth": 1, "zorder": 1}
    alike = [other for other in lines if other.partition(" ")[0] == selector]
    return {"color": color, "marker": MARKERS[alike.index(line) % len(MARKERS)], "markersize": 4}


def _order(lines: Iterable[str]) -> list[str]:
    names = list(COLORS)
    return sorted(set(lines), key=lambda line: (names.index(line.partition(" ")[0]), line))


def _draw_sweep(figure: Any, rows: Sequence[AccuracyRow], sweep: Sweep) -> None:  # noqa: ANN401 - as above
    values = sorted({value for row in rows if (value := sweep.value(row)) is not None})
    panels = curves(rows, sweep)
    lines = _order(line for panel in panels.values() for line in panel)
    columns = min(COLUMNS, len(panels))
    height = -(-len(panels) // columns)
    figure.set_size_inches(columns * PANEL_INCHES[0], height * PANEL_INCHES[1] + LEGEND_INCHES)
    axes = figure.subplots(height, columns, squeeze=False, sharey=True).ravel()
    figure.supylabel("accuracy", fontsize=9)
    for axis, (name, panel) in zip(axes, panels.items(), strict=False):
        for line in lines:
            curve = sorted(panel.get(line, {}).items())
            places = [values.index(value) for value, _ in curve]
            axis.plot(places, [accuracy for _, accuracy in curve], label=line, **_style(line, lines))
        axis.set_xticks(range(len(values)), [sweep.tick(value) for value in values])
        _finish(axis, name)
        axis.set_xlabel(sweep.label, fontsize=8)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    _add_title_and_legend(figure, axes[0], rows[0], sweep.field)


def _draw_selectors(figure: Any, rows: Sequence[AccuracyRow]) -> None:  # noqa: ANN401 - as above
    """A panel for each prompt length: bars by task and selector."""
    lengths = sorted({row.tokens for row in rows})
    panels = {length: [row for row in rows if row.tokens == length] for length in lengths}
    tasks = list(dict.fromkeys(row.task for row in rows))
    lines = _order([DENSE, *(_line(row, rows, "tokens") for row in rows)])
    width_inches = max(2 * PANEL_INCHES[0], len(tasks) * (len(lines) + 2) * BAR_INCHES)
    figure.set_size_inches(width_inches, len(lengths) * PANEL_INCHES[1] + LEGEND_INCHES)
    axes = figure.subplots(len(lengths), squeeze=False)[:, 0]
    figure.supylabel("accuracy", fontsize=9)
    width = 0.85 / len(lines)
    for axis, (length, of_length) in zip(axes, panels.items(), strict=True):
        for place, line in enumerate(lines):
            heights = {row.task: row.accuracy or 0.0 for row in of_length if _line(row, rows, "tokens") == line}
            if line == DENSE:
                heights = {row.task: row.dense_accuracy for row in of_length if row.dense_accuracy is not None}
            left = [tasks.index(task) + (place - (len(lines) - 1) / 2) * width for task in heights]
            color = COLORS[line.partition(" ")[0]]
            axis.bar(left, list(heights.values()), width * 0.9, color=color, label=line)
        axis.set_xticks(range(len(tasks)), tasks)
        _finish(axis, f"{length:,} tokens")
    _add_title_and_legend(figure, axes[0], rows[0], "tokens")


def _finish(axis: Any, name: str) -> None:  # noqa: ANN401 - as above
    axis.set_title(name, loc="left", fontsize=10)
    axis.set_ylim(-0.03, 1.05)
    axis.tick_params(labelsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _add_title_and_legend(figure: Any, axis: Any, row: AccuracyRow, but: str) -> None:  # noqa: ANN401 - as above
    figure.suptitle(_title(row, but), fontsize=9, x=0.01, ha="left")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(LEGEND_COLUMNS, len(labels)), frameon=False, fontsize=8
    )


def _title(row: AccuracyRow, but: str) -> str:
    told = {
        "tokens": f"{row.tokens:,} tokens",
        "free_ratio": f"ratio {row.ratio:g}" if row.device_share is None else "",
        "device_share": f"{row.device_share:.1%} of the bytes" if row.device_share is not None else "",
        "tau": f"tau {row.tau}",
        "groups": "one layer group" if row.groups == 1 else f"{row.groups} layer groups",
        "questions": f"{row.questions} questions a cell",
        "batch": f"batch {row.batch}",
        "gpu": row.gpu,
    }
    return ", ".join(text for name, text in told.items() if text and name != but)
