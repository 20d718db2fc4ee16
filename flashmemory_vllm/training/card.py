"""What a training run leaves beside the weights: curves as numbers and as a picture, and a card in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.files import write_json, write_text
from flashmemory_vllm.indexer.neural_model import IndexerSpec
from flashmemory_vllm.training.evaluation import RATIOS
from flashmemory_vllm.training.frame import MAIN_RATIO

WIDTH_INCHES = 9.0
HEIGHT_INCHES = 3.6
DPI = 150


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What the card tells.

    Attributes:
        spec: the indexer's sizes.
        provenance: command, commit, device and versions.
        parameters: number of weights.
        documents: documents trained on, and kept back for validation.
        questions: validation tokens.
        steps: steps taken.
        minutes: wall-clock of training.
        history: a row for each validation.
        scores: recall, mass and loss by name of the selector, on the validation documents.
        reached: share of the candidates that reach the threshold, and what they have of all that any are worth.
    """

    spec: IndexerSpec
    provenance: Provenance
    parameters: int
    documents: tuple[int, int]
    questions: int
    steps: int
    minutes: float
    history: Sequence[Mapping[str, float]]
    scores: Mapping[str, Mapping[str, float]]
    reached: tuple[float, float]


def require_matplotlib() -> None:
    """Tell that matplotlib is missing before a run, not after it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401 - only whether it is there
    except ImportError:
        raise ConfigError("the training curves need matplotlib: pip install 'flashmemory-vllm[bench]'") from None


def write_report(report: TrainingReport, weights: Path) -> tuple[Path, Path, Path]:
    """Write curves and card beside the weights.

    Args:
        report: what to tell.
        weights: file of the weights.

    Returns:
        The card, the curves as JSON and as a picture.
    """
    card, curves, picture = (weights.with_suffix(suffix) for suffix in (".md", ".curves.json", ".png"))
    rows = {"history": [dict(row) for row in report.history], "selectors": report.scores}
    write_json(curves, _without_nan(rows), indent=2)
    _draw(report, picture)
    write_text(card, _card(report, weights, picture, curves))
    return card, curves, picture


def _without_nan(value: object) -> object:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if value != value else value  # noqa: PLR0124 - only NaN differs from itself


def _draw(report: TrainingReport, path: Path) -> None:
    from matplotlib.figure import Figure

    steps = [row["step"] for row in report.history]
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, [row["loss"] for row in report.history], color="#8c8c8c", marker=".")
    left.set_title("loss", loc="left", fontsize=10)
    for what, color in (("recall", "#1f6fb2"), ("mass", "#c9a66b")):
        name = f"{what}@{MAIN_RATIO}"
        right.plot(steps, [row[name] for row in report.history], color=color, marker=".", label=what)
        right.axhline(report.scores["bounds"][name], color=color, linestyle=":", label=f"{what} of bounds")
    right.set_title(f"validation at {MAIN_RATIO:.1%} of the blocks", loc="left", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI)


def _card(report: TrainingReport, weights: Path, picture: Path, curves: Path) -> str:
    spec = report.spec
    return _CARD.format(
        model=spec.model,
        parameters=report.parameters,
        anchors=", ".join(map(str, spec.anchor_layers)),
        heads=spec.num_heads,
        dim=spec.dim,
        rank=spec.rank,
        aggregate=spec.aggregate,
        bytes_per_block=spec.bytes_per_block + spec.key_bytes_per_block,
        chunk_size=spec.chunk_size,
        reach=spec.reach,
        query_window=spec.query_window,
        opening_steps=spec.opening_steps,
        block_size=spec.block_size,
        query_heads=spec.num_query_heads,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        decays=", ".join(map(str, spec.memory_decays)) or "none",
        tau=spec.tau,
        delay=spec.delay,
        weights=weights.name,
        command=report.provenance.command,
        commit=report.provenance.commit,
        device=report.provenance.gpu,
        versions=", ".join(f"{name} {version}" for name, version in report.provenance.versions.items()),
        minutes=report.minutes,
        steps=report.steps,
        train=report.documents[0],
        held_back=report.documents[1],
        questions=report.questions,
        data=spec.data[:12],
        itself=_ITSELF if spec.memory_decays else "",
        table=_table(report.scores),
        threshold=spec.forecast_threshold if spec.memory_decays else spec.threshold,
        reached=report.reached[0],
        precise=report.reached[1],
        picture=picture.name,
        curves=curves.name,
    )


def _table(scores: Mapping[str, Mapping[str, float]]) -> str:
    names = {"recall": "worth kept", "mass": "attention kept", "lost": "largest share lost", "fetched": "fetched"}
    columns = [(what, ratio) for what in names for ratio in RATIOS]
    lines = ["| selector | " + " | ".join(f"{names[what]} at {ratio:.1%}" for what, ratio in columns) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for name, values in scores.items():
        cells = (f"{values[f'{what}@{ratio}']:.3f}" for what, ratio in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


_ITSELF = (
    "`neural` reads what heads paid to blocks before, too; `held` is the same as it is served, where what it expects "
    "of a block that is held counts twice; `content` is the indexer without what was paid. "
)
_CARD = """\
---
library_name: flashmemory-vllm
tags: [kv-cache, long-context, sparse-attention]
---

# Neural indexer for {model}

Chooses the KV blocks that stay on the device while {model} decodes. It reads queries and keys of the anchor layers \
{anchors}, and fits models with {query_heads} query heads, {kv_heads} KV heads of {head_dim} and blocks of \
{block_size} tokens.

    vllm serve MODEL --attention-backend flashmemory \\
        --additional-config '{{"flashmemory": {{"indexer": "{weights}", "tau_steps": {tau}}}}}'

| | |
| --- | --- |
| parameters | {parameters:,} |
| index bytes of a block | {bytes_per_block:,} |
| tokens of a chunk, chunks that speak for the next block, tokens of a question, opening steps | {chunk_size}, \
{reach}, {query_window}, {opening_steps} |
| index heads, code, bottleneck | {heads}, {dim}, {rank} |
| layers combined by | {aggregate} |
| memory fades a token by | {decays} |
| selections in force | {tau} steps, from {delay} after the query's own |

## Training

    {command}

{minutes:.2g} minutes and {steps:,} steps on {device}, commit {commit} ({versions}), with {train:,} documents of the \
recording {data}. {held_back:,} other documents were kept back; {questions:,} of their tokens are the questions below.

![training curves]({picture})

## What it keeps

A block is worth the fourth power of the largest share that any head of any layer pays to it in the answer, or after \
its beginning during {tau} steps. Of the attention paid then, mean over all heads, the rest is lost; the largest share \
lost is what any head paid to a single block that was left out, mean over those tokens. Fetched are blocks that a \
selection adds to the set before it. Over all candidates, with sink and recent blocks as in serving. {itself}\
`oracle` knows the shares to come; `mix` adds up what blocks are remembered for with decays of 0.9 and 0.98, hands \
half of it on to the next block, and doubles it where a block is held; `last` is what the last token paid; the others \
need no training either. All numbers are in `{curves}`.

{table}

A score of {threshold:.2g} is reached by {reached:.1%} of the blocks that are not forced; these have {precise:.1%} of \
what all are worth.
"""
