"""Pictures of benchmark rows: speed over stock as a map of context and batch, or bars side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashmemory_vllm.benchmark.rows import BenchRow
from flashmemory_vllm.errors import ConfigError

ENGINES = ("stock", "ideal", "offload", "flashmemory")
COLORS = {"stock": "#8c8c8c", "ideal": "#b9d3ea", "offload": "#c9a66b", "flashmemory": "#1f6fb2"}
# A grid of at least this many contexts and batches is drawn as a map
SMALLEST_GRID = 2
# Of the map's colours, seen from white: those that only white text can be read on
DARK_SHARE = 0.6
WIDTH_INCHES = 9.0
HEIGHT_INCHES = 4.2
DPI = 150


def plot_rows(rows: Sequence[BenchRow], path: Path) -> None:
    """Draw one panel for each scenario, model and metric.

    Args:
        rows: of any scenarios.
        path: picture; its suffix says the format.

    Raises:
        ConfigError: matplotlib is not installed, or no row has a value.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'flashmemory-vllm[bench]'") from None
    panels: dict[tuple[str, str, str], list[BenchRow]] = {}
    for row in rows:
        panels.setdefault((row.scenario, row.model, row.metric), []).append(row)
    panels = {key: group for key, group in panels.items() if any(row.value is not None for row in group)}
    if not panels:
        raise ConfigError("--plot: no row has a value, allowed are rows of at least one successful measurement")
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axis, ((scenario, model, _), group) in zip(axes, panels.items(), strict=True):
        if is_grid(group):
            _draw_map(axis, group)
        else:
            _draw_bars(axis, group)
        axis.set_title(f"{scenario}: {model} on {group[0].gpu}", loc="left", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def is_grid(rows: Sequence[BenchRow]) -> bool:
    """Whether step times of our engine make a grid of contexts and batches."""
    if rows[0].metric != "step_ms":
        return False
    places = {_place(row) for row in rows if row.engine == "flashmemory"}
    return all(len({place[side] for place in places}) >= SMALLEST_GRID for side in (0, 1))


def speedups(rows: Sequence[BenchRow]) -> tuple[list[int], list[int], np.ndarray]:
    """How many times faster than stock our engine is at each context and batch.

    Args:
        rows: step times of one scenario.

    Returns:
        Contexts and batches in ascending order, and [batches, contexts] with NaN where either engine has no
        value or did not decode the whole batch at once.
    """
    ours = {_place(row): row for row in rows if row.engine == "flashmemory"}
    contexts = sorted({context for context, _ in ours})
    batches = sorted({batch for _, batch in ours})
    grid = np.full((len(batches), len(contexts)), np.nan)
    for place, row in ours.items():
        if row.ratio is not None and row.decoding == row.batch:
            grid[batches.index(place[1]), contexts.index(place[0])] = row.ratio
    return contexts, batches, grid


def _place(row: BenchRow) -> tuple[int, int]:
    return row.prompt_tokens // row.batch, row.batch


def _draw_map(axis: Any, rows: Sequence[BenchRow]) -> None:  # noqa: ANN401 - matplotlib is optional
    from matplotlib.patches import Rectangle

    contexts, batches, grid = speedups(rows)
    # In logarithms twice as fast and half as fast are equally far from white
    limit = max(1.0, float(np.nanmax(np.abs(np.log2(grid)), initial=0.0)))
    image = axis.imshow(
        np.log2(grid), origin="lower", aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest"
    )
    ours = {_place(row): row for row in rows if row.engine == "flashmemory"}
    for (y, x), speedup in np.ndenumerate(grid):
        if np.isnan(speedup):
            row = ours.get((contexts[x], batches[y]))
            axis.text(x, y, _why_empty(row), ha="center", va="center", fontsize=7, color="#777777")
            continue
        is_dark = abs(np.log2(speedup)) > DARK_SHARE * limit
        axis.text(x, y, f"{speedup:.2f}", ha="center", va="center", fontsize=8, color="white" if is_dark else "black")
        if speedup < 1:
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="///", edgecolor="#a03030", lw=0))
    axis.set_xticks(range(len(contexts)), [f"{context // 1024}K" for context in contexts])
    axis.set_yticks(range(len(batches)), [str(batch) for batch in batches])
    axis.set_xlabel("prompt tokens of a request")
    axis.set_ylabel("requests at once")
    bar = axis.figure.colorbar(image, ax=axis)
    ticks = np.arange(-np.floor(limit), np.floor(limit) + 1)
    bar.set_ticks(ticks, labels=[f"{2.0**tick:g}x" for tick in ticks])
    bar.set_label("stock step / flashmemory step", fontsize=8)
    axis.set_title("hatched: slower than stock", loc="right", fontsize=8)


def _why_empty(row: BenchRow | None) -> str:
    if row is None:
        return ""
    if row.error is not None or row.value is None or row.decoding != row.batch:
        return "does not fit"
    return f"stock: no\n{row.value:.3g} {row.unit.split('/')[0]}"


def _draw_bars(axis: Any, rows: Sequence[BenchRow]) -> None:  # noqa: ANN401 - matplotlib is optional
    rows = [row for row in rows if row.value is not None]
    names = list(dict.fromkeys(row.measurement for row in rows))
    engines = [engine for engine in ENGINES if any(row.engine == engine for row in rows)]
    width = 0.8 / len(engines)
    for place, engine in enumerate(engines):
        own = [row for row in rows if row.engine == engine]
        left = [names.index(row.measurement) + (place - (len(engines) - 1) / 2) * width for row in own]
        bars = axis.bar(left, [row.value for row in own], width * 0.92, label=engine, color=COLORS[engine])
        axis.bar_label(bars, fmt="{:,.4g}", fontsize=8, padding=2)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel(rows[0].unit)
    axis.set_ylim(bottom=0)
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, ncols=len(engines), loc="upper center", bbox_to_anchor=(0.5, -0.1))
