"""Rows of the accuracy table: what was measured under which setting, in JSON and in Markdown."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.tasks import AnyTaskName
from flashmemory_vllm.files import write_json

# Further options of ours, by name, in the order of the names
OptionValue = str | int | float | bool | None
MoreOptions = tuple[tuple[str, OptionValue], ...]

DENSE = "full"
NEURAL = "neural"
MIB = 1 << 20
_HEADS = {"fallbacks": "fallbacks", "device_bytes": "device MiB"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to keep a resident set.

    Attributes:
        selector: name of the selector.
        tau: decode steps between two selections.
        ratio: resident blocks over all blocks of a request.
        groups: layer groups that choose sets of their own.
        anchors: layers whose queries and keys feed the selector. Default: what our configuration chooses.
        indexer: trained indexer, for the selector `neural`.
        score_threshold: score below which a block gets no slot. Default: the selector's own, if it has one.
        fallback_share: selected share above which a request keeps all its blocks. Default: never.
        device_share: device bytes of a request, index keys included, over those of all its blocks; `ratio` is what
            the index keys leave of it. Default: the ratio was asked for, and the index keys come on top.
        query_window: prompt tokens that a first selection is made with. Default: a trained indexer's own, else 1.
        opening_steps: decode steps that each end with a selection of their own. Default: as trained, else none.
        options: further options of ours. Default: what suits the selector.
    """

    selector: str
    tau: int
    ratio: float
    groups: int
    anchors: tuple[int, ...] | None = None
    indexer: str | None = None
    score_threshold: float | None = None
    fallback_share: float | None = None
    device_share: float | None = None
    query_window: int | None = None
    opening_steps: int | None = None
    options: MoreOptions = ()

    def all_options(self) -> dict[str, object]:
        """The same as options of our configuration."""
        return {
            "selector": self.selector,
            "indexer": self.indexer,
            "tau_steps": self.tau,
            "resident_ratio": self.ratio,
            "layer_groups": self.groups,
            "anchor_layers": self.anchors,
            "score_threshold": self.score_threshold,
            "dense_fallback_share": self.fallback_share,
            "query_window": self.query_window,
            "opening_steps": self.opening_steps,
            **dict(self.options),
        }


@dataclass(frozen=True, slots=True)
class AccuracyRow:
    """One measured cell with what it was measured with.

    Attributes:
        model: name of the model.
        block_size: tokens in a KV block.
        task: name of the task.
        tokens: tokens of each prompt.
        selector: see `Setting`, as are tau, ratio, groups and anchors.
        tau: decode steps between two selections.
        ratio: resident ratio that was asked for.
        groups: layer groups.
        anchors: anchor layers, None for the default.
        questions: how many were asked.
        accuracy: mean score of the answers, see `questions.score`; None if the cell was not measured.
        dense_accuracy: that of dense attention on the same questions, if it was measured.
        resident_share: blocks that decode steps attended to over blocks they would have dense, measured.
        recalled_blocks: blocks copied to the device because a step was to read them.
        device_bytes_index_per_block: device bytes of a block's index keys, if the engine tells.
        command: see `Provenance`, as are commit, gpu and versions.
        commit: commit of the checkout.
        gpu: name of the device.
        versions: version by distribution.
        indexer: trained indexer, if the selector has one.
        score_threshold: see `Setting`.
        batch: requests that ran at once; None in rows from before it was told.
        fallback_share: see `Setting`, as is device_share.
        device_share: share of a request's bytes that was asked for.
        device_bytes: device bytes of one prompt while it decodes, for the resident blocks that were measured and the
            index keys of all its blocks, whether resident or not; None in rows from before it was told.
        fallbacks: requests that fell back to all their blocks.
        refused_fallbacks: selections after which a request would have, had there been slots.
        not_measured: why accuracy is None.
        query_window: see `Setting`, as are opening_steps and options.
    """

    model: str
    block_size: int
    task: AnyTaskName
    tokens: int
    selector: str
    tau: int
    ratio: float
    groups: int
    anchors: tuple[int, ...] | None
    questions: int
    accuracy: float | None
    dense_accuracy: float | None
    resident_share: float | None
    recalled_blocks: int
    device_bytes_index_per_block: float | None
    command: str
    commit: str
    gpu: str
    versions: dict[str, str]
    indexer: str | None = None
    score_threshold: float | None = None
    batch: int | None = None
    fallback_share: float | None = None
    device_share: float | None = None
    device_bytes: int | None = None
    fallbacks: int | None = None
    refused_fallbacks: int | None = None
    not_measured: str | None = None
    query_window: int | None = None
    opening_steps: int | None = None
    options: MoreOptions = ()

    @property
    def setting(self) -> Setting:
        """What was set for this row."""
        return Setting(**{field.name: getattr(self, field.name) for field in fields(Setting)})

    @property
    def free_ratio(self) -> float | None:
        """The ratio, unless it follows from a share of the device's bytes."""
        return self.ratio if self.device_share is None else None

    @property
    def questions_key(self) -> tuple[object, ...]:
        """Equal for rows whose accuracies may be compared."""
        return self.model, self.block_size, self.task, self.tokens, self.questions


def with_dense(rows: Sequence[AccuracyRow]) -> list[AccuracyRow]:
    """The same rows, each with the dense accuracy on its questions where one is known, if possible in its batch."""
    dense = {row.questions_key: row.accuracy for row in rows if row.selector == DENSE}
    in_batch = {(row.questions_key, row.batch): row.accuracy for row in rows if row.selector == DENSE}

    def of(row: AccuracyRow) -> float | None:
        return in_batch.get((row.questions_key, row.batch), dense.get(row.questions_key))

    return [replace(row, dense_accuracy=of(row)) for row in rows]


def load_rows(path: Path) -> list[AccuracyRow]:
    """Read a file of rows; a missing file has none.

    Raises:
        ConfigError: the file is no list of accuracy rows.
    """
    if not path.exists():
        return []
    try:
        rows = [AccuracyRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        names = ", ".join(field.name for field in fields(AccuracyRow))
        raise ConfigError(f"{path} ({error}): allowed is a JSON list of objects with {names}") from None
    # JSON has no tuples
    return [
        replace(
            row,
            anchors=None if row.anchors is None else tuple(row.anchors),
            options=tuple((name, value) for name, value in row.options),
        )
        for row in rows
    ]


def save_rows(path: Path, rows: Sequence[AccuracyRow]) -> None:
    """Write a file of rows; whoever reads it meets the old ones or the new ones, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [asdict(row) for row in rows])


def format_report(rows: Sequence[AccuracyRow]) -> str:
    """Markdown tables of all rows, under a heading for each model, block size and number of questions."""
    parts = {}
    for model, block_size, questions in dict.fromkeys((row.model, row.block_size, row.questions) for row in rows):
        heading = f"## {model}: {questions} questions a cell, blocks of {block_size} tokens"
        parts[heading] = [
            row for row in rows if (row.model, row.block_size, row.questions) == (model, block_size, questions)
        ]
    return "\n\n".join(f"{heading}\n\n{format_tables(part)}" for heading, part in parts.items())


def format_tables(rows: Sequence[AccuracyRow]) -> str:
    """Markdown tables of settings by prompt length: one for each task, and one of the mean over the tasks.

    Args:
        rows: of one model, block size and number of questions.
    """
    tasks = list(dict.fromkeys(row.task for row in rows))
    tables = [f"### {task}\n\n{_table([row for row in rows if row.task == task], rows, 1)}" for task in tasks]
    if len(tasks) > 1:
        tables.append(f"### mean over the tasks\n\n{_table(rows, rows, len(tasks))}")
    unmeasured = dict.fromkeys(
        f"- not measured: {row.selector} at {row.tokens:,} tokens: {row.not_measured}"
        for row in rows
        if row.not_measured is not None
    )
    if unmeasured:
        tables.append("\n".join(unmeasured))
    return "\n\n".join(tables)


def _table(rows: Sequence[AccuracyRow], all_rows: Sequence[AccuracyRow], num_tasks: int) -> str:
    """One table; a cell is empty unless each of `num_tasks` tasks has a row for it."""
    lengths = sorted({row.tokens for row in rows})
    names = ["selector", "ratio", "tau", "groups", "anchors", *_differing(all_rows)]
    extra = [name for name in ("fallbacks", "device_bytes") if any(getattr(row, name) is not None for row in all_rows)]
    head = [*names, *(f"{tokens:,}" for tokens in lengths), "resident", *(_HEADS[name] for name in extra)]
    lines = [head, ["---"] * len(head)]
    for way in dict.fromkeys((row.setting, row.batch) for row in rows):
        of_way = [row for row in rows if (row.setting, row.batch) == way]
        line = [_cell(of_way[0], name) for name in names]
        for tokens in lengths:
            of_length = [row for row in of_way if row.tokens == tokens]
            cell = [row.accuracy for row in of_length if row.accuracy is not None]
            unmeasured = "-" if any(row.not_measured for row in of_length) else ""
            line.append(f"{fmean(cell):.3f}" if len(cell) == num_tasks else unmeasured)
        shares = [row.resident_share for row in of_way if row.resident_share is not None]
        line.append(f"{fmean(shares):.1%}" if shares else "")
        lines.append([*line, *(_by_length(of_way, name) for name in extra)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_length(rows: Sequence[AccuracyRow], name: str) -> str:
    """What differs with the prompt length and not with the task: a figure for each length, shortest first."""
    figures = []
    for tokens in sorted({row.tokens for row in rows}):
        values = [value for row in rows if row.tokens == tokens and (value := getattr(row, name)) is not None]
        shown = fmean(values) if values else None
        if name == "device_bytes" and shown is not None:
            shown /= MIB
        figures.append("-" if shown is None else f"{shown:.3g}")
    return " / ".join(figures)


def _differing(rows: Sequence[AccuracyRow]) -> list[str]:
    """What only some tables need a column for: whatever has more than one value."""
    names = (
        *("device_share", "batch", "query_window", "opening_steps"),
        *("score_threshold", "fallback_share", "indexer", "options"),
    )
    without = {"indexer": {row.indexer for row in rows if row.selector != NEURAL}}
    return [name for name in names if len({getattr(row, name) for row in rows} - without.get(name, set())) > 1]


def _cell(row: AccuracyRow, name: str) -> str:
    value = getattr(row, name)
    if name == "anchors":
        return "default" if value is None else " ".join(map(str, value))
    if name == "options":
        return ", ".join(f"{option} {given}" for option, given in value)
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
