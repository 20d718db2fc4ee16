"""Pictures of `flashmemory eval`: heat maps of the needles, and how long and how closely two servers agree."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.eval_rows import SIDES, EvalRow, Side
from flashmemory_vllm.evaluation.parity import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
CELL_INCHES = (0.95, 0.42)
SIDE_COLORS: Mapping[Side, str] = {"dense": "#555555", "sparse": "#1f6fb2"}
SIDE_LABELS: Mapping[Side, str] = {"dense": "dense, asked again", "sparse": "sparse"}
LEAST_KL = 1e-9
# Below this a cell is dark, and its figure is written in white.
LIGHT_SCORE = 0.45


def check_installed() -> None:
    """See that there is something to draw with, before hours are spent on measuring.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    _new_figure()


def plot_needles(rows: Sequence[EvalRow], title: str, path: Path) -> None:
    """Draw the share of right answers by depth and length, the dense server left and the sparse one right.

    Args:
        rows: of the suite needles, of both sides.
        title: what was asked.
        path: PNG file to write.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    lengths = sorted({row.tokens for row in rows})
    depths = sorted({row.depth for row in rows if row.depth is not None})
    scores = {(row.side, row.depth, row.tokens): row.score for row in rows}
    figure = _new_figure()
    width = 2 * (len(lengths) * CELL_INCHES[0] + 0.6) + 1.2
    figure.set_size_inches(width, len(depths) * CELL_INCHES[1] + 1.3)
    axes = figure.subplots(1, len(SIDES), sharey=True)
    for axis, side in zip(axes, SIDES, strict=True):
        grid = [[_number(scores.get((side, depth, length))) for length in lengths] for depth in depths]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, line in enumerate(grid):
            for x, score in enumerate(line):
                color = "white" if score < LIGHT_SCORE else "black"
                text = "" if math.isnan(score) else f"{score:.0%}"
                axis.text(x, y, text, ha="center", va="center", color=color, fontsize=8)
        axis.set_title(side, loc="left", fontsize=10)
        axis.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axis.set_xlabel("prompt tokens", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("depth of the fact", fontsize=8)
    figure.suptitle(f"{title}, {rows[0].questions} questions a cell", fontsize=9, x=0.01, ha="left")
    bar = figure.colorbar(image, ax=axes, fraction=0.04)
    bar.set_label("right answers", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=DPI)


def plot_parity(rows: Sequence[EvalRow], title: str, path: Path) -> None:
    """Draw by position the share of texts that are still the same, and the divergence from the dense server.

    Args:
        rows: of the suite parity, of either side.
        title: what was asked.
        path: PNG file to write.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    lengths = sorted({row.tokens for row in rows})
    figure = _new_figure()
    figure.set_size_inches(2.4 + 2.6 * len(lengths), 4.6)
    axes: Any = figure.subplots(2, len(lengths), squeeze=False, sharex="col", sharey="row")
    for column, length in enumerate(lengths):
        for row in rows:
            if row.tokens == length:
                _draw_comparison(axes[0, column], axes[1, column], row)
        axes[0, column].set_title(f"{_tokens(length)} tokens", loc="left", fontsize=10)
        axes[0, column].set_ylim(-0.03, 1.05)
        axes[1, column].set_yscale("log")
        axes[1, column].set_xlabel("generated token", fontsize=8)
    axes[0, 0].set_ylabel("texts still the same", fontsize=8)
    axes[1, 0].set_ylabel("KL of the top tokens (nats)", fontsize=8)
    for axis in axes.ravel():
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}, {rows[0].questions} texts a length", fontsize=9, x=0.01, ha="left")
    axes[0, 0].legend(fontsize=8, frameon=False, loc="lower left")
    figure.savefig(path, dpi=DPI)


def _draw_comparison(upper: Any, lower: Any, row: EvalRow) -> None:  # noqa: ANN401 - matplotlib is optional
    compared = Comparison(**row.details)
    style = {"color": SIDE_COLORS[row.side], "label": SIDE_LABELS[row.side], "linewidth": 1.4}
    upper.step(*survival(compared), where="post", **style)
    positions = range(max(map(len, compared.kl), default=0))
    kl = [fmean(values[at] for values in compared.kl if len(values) > at) for at in positions]
    lower.plot([at + 1 for at in positions], [max(LEAST_KL, value) for value in kl], **style)


def survival(compared: Comparison) -> tuple[list[int], list[float]]:
    """Numbers of tokens, from 0, and the share of texts that have not parted within so many."""
    last = max(compared.lengths, default=0)
    parted = sorted(compared.divergences)
    tokens = list(range(last + 1))
    return tokens, [1 - sum(position < count for position in parted) / len(compared.lengths) for count in tokens]


def _new_figure() -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the report needs matplotlib: pip install 'flashmemory-vllm[eval]'") from None
    return Figure(layout="constrained")


def _number(score: float | None) -> float:
    return math.nan if score is None else score


def _tokens(length: int) -> str:
    return f"{length / 1024:g}K" if length % 1024 == 0 else f"{length:,}"
