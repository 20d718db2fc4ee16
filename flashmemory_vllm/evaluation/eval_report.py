"""The report of `flashmemory eval`, made of `eval.json` alone: tables, pictures, and where the figures come from."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.eval_plot import SIDE_LABELS, plot_needles, plot_parity
from flashmemory_vllm.evaluation.eval_rows import FILE_NAME, SIDES, EvalRow, Evaluation, Side, load_evaluation
from flashmemory_vllm.evaluation.gate import ALL_QUESTIONS, Judged, Limits, Verdict, judge, passes, verdicts
from flashmemory_vllm.evaluation.loss import POSITIONS, loss_lines
from flashmemory_vllm.evaluation.parity import TOP_LOGPROBS, Comparison
from flashmemory_vllm.evaluation.report_blocks import Block, Heading, Picture, Table, Text, to_html, to_markdown
from flashmemory_vllm.files import write_text
from flashmemory_vllm.reference import reference_model_path

MARKDOWN, HTML = "report.md", "report.html"
MAX_WRONG = 12
PARITY_HEADER = (
    *("tokens", "server", "texts", "identical", "tokens that agree", "first divergence", "median"),
    *("KL, first token", "KL, later", "KL, largest", "resident"),
)


def write_report(folder: Path, limits: Limits) -> list[Path]:
    """Write `report.md`, `report.html` and the pictures into a folder that has an `eval.json`.

    Args:
        folder: the folder.
        limits: what to judge by; what is not asked for has no verdict.

    Returns:
        The two reports.

    Raises:
        ConfigError: there is no `eval.json`, it holds something else, or matplotlib is not installed.
    """
    evaluation = load_evaluation(folder)
    if evaluation is None:
        raise ConfigError(f"{folder / FILE_NAME} does not exist: allowed is the --out of an earlier run")
    blocks = list(_blocks(evaluation, folder, limits))
    texts = {MARKDOWN: to_markdown(blocks), HTML: to_html(f"Evaluation of {evaluation.model}", blocks)}
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def score_table(lines: Sequence[Judged], judged: Mapping[str, Verdict]) -> Table:
    """Scores beside each other, with a verdict where there is something to judge by."""
    header = ["suite", "task", "tokens", "questions", "dense", "sparse", "relative", "lost", "gained", "resident"]
    rows = [
        [
            line.suite,
            line.task,
            f"{line.tokens:,}",
            str(line.questions),
            f"{line.dense:.3f}",
            f"{line.sparse:.3f}",
            _optional(line.relative, ".3f"),
            _optional(line.lost, "d"),
            _optional(line.gained, "d"),
            _optional(line.resident_share, ".1%"),
        ]
        for line in lines
    ]
    return _with_verdicts(header, rows, [line.name for line in lines], judged)


def _with_verdicts(
    header: list[str], rows: list[list[str]], names: Sequence[str], judged: Mapping[str, Verdict]
) -> Table:
    """A table with a column of verdicts, if its lines were judged."""
    if not set(names) & judged.keys():
        return Table(header, rows)
    return Table([*header, "verdict"], [[*row, judged[name]] for row, name in zip(rows, names, strict=True)])


def _blocks(evaluation: Evaluation, folder: Path, limits: Limits) -> Iterator[Block]:
    yield Heading(1, f"Evaluation of {evaluation.model}")
    yield Text(
        "The same prompts were put to a server with dense attention (dense) and to one that keeps a part of the KV "
        "blocks on the device (sparse)."
    )
    lines, judged = judge(evaluation), verdicts(evaluation, limits)
    if limits.told:
        yield Text(
            f"Gate: {'passed' if passes(evaluation, limits) else 'failed'}. Asked is {limits.told} on every line."
        )
    if lines:
        yield Heading(2, "Scores")
        yield score_table(lines, judged)
        yield Text(
            "relative: sparse over dense. lost, gained: questions that only the dense or only the sparse server "
            "answered. resident: blocks that decode steps attended to over those of dense attention, as counted by "
            "the server."
        )
    yield from _loss(evaluation, judged)
    yield from _parity(evaluation, folder)
    yield from _needles(evaluation, folder)
    yield from _longbench(evaluation)
    yield from _provenance(evaluation)


def _loss(evaluation: Evaluation, judged: Mapping[str, Verdict]) -> Iterator[Block]:
    lines = loss_lines(evaluation)
    if not lines:
        return
    yield Heading(2, "Loss on text")
    header = ["tokens", "texts", "forced tokens", "dense", "sparse above dense", "standard error"]
    header += ["first 16", "last 16", "blocks fetched a token", "resident"]
    rows = [
        [
            *(f"{line.tokens:,}", str(line.documents), str(line.steps), f"{line.dense:.4f}", f"{line.gap:+.4f}"),
            *(_optional(line.stderr, ".4f"), f"{line.positions[0]:+.4f}", f"{line.positions[-1]:+.4f}"),
            *(_optional(line.fetched_blocks, ".3f"), _optional(line.resident_share, ".1%")),
        ]
        for line in lines
    ]
    yield _with_verdicts(header, rows, [line.name for line in lines], judged)
    yield Text(
        "Both servers were forced along the same text after the same prompts; nats a token, mean over the texts, from "
        f"the second token on. Means over {POSITIONS} tokens at the beginning and at the end tell whether the loss "
        "grows. The standard error is that of the mean difference, text by text."
    )


def _parity(evaluation: Evaluation, folder: Path) -> Iterator[Block]:
    rows = sorted((row for row in evaluation.rows if row.suite == "parity"), key=lambda row: (row.tokens, row.side))
    if not rows:
        return
    yield Heading(2, "Parity with dense")
    yield Table(PARITY_HEADER, [_parity_line(row) for row in rows])
    yield Text(
        "Greedy continuations beside those of the dense server, asked one at a time. The dense server, asked again, is "
        "the control: it shows how far a server agrees with itself. Tokens that agree are those before the first "
        "divergence, over all; its position is told as the least and the median, from 0. KL in nats, from dense to the "
        "other server, at positions whose prefixes are the same; it knows the "
        f"{TOP_LOGPROBS} likeliest tokens of both, so it is a lower bound. The first token comes from prefill, which "
        "is dense on both sides: its KL is the noise between the servers."
    )
    path = folder / "parity.png"
    plot_parity(rows, _short_name(evaluation.model), path)
    yield Picture(path, "Texts that are still the same, and KL, by generated token")


def _parity_line(row: EvalRow) -> list[str]:
    compared = Comparison(**row.details)
    return [
        f"{row.tokens:,}",
        SIDE_LABELS[row.side],
        str(row.questions),
        f"{compared.identical_share:.1%}",
        f"{compared.agreeing_share:.1%}",
        _optional(min(compared.divergences, default=None), "d"),
        _optional(compared.median_divergence, "g"),
        _optional(compared.prefill_kl, ".2g"),
        _optional(compared.decode_kl, ".2g"),
        _optional(compared.max_decode_kl, ".2g"),
        _optional(row.resident_share, ".1%"),
    ]


def _needles(evaluation: Evaluation, folder: Path) -> Iterator[Block]:
    rows = [row for row in evaluation.rows if row.suite == "needles"]
    if not rows:
        return
    yield Heading(2, "Needles")
    path = folder / "needles.png"
    plot_needles(rows, _short_name(evaluation.model), path)
    yield Picture(path, "Share of right answers by depth and length, dense and sparse")
    yield _needle_table(rows)
    yield Text(f"dense / sparse, {rows[0].questions} questions a cell.")
    yield from _wrong_answers(evaluation.of("needles", "sparse"))


def _wrong_answers(rows: Sequence[EvalRow]) -> Iterator[Block]:
    wrong = [
        [f"{row.tokens:,}", _optional(row.depth, ".0%"), answer["expected"], answer["answer"]]
        for row in rows
        for answer in row.wrong
    ]
    if not wrong:
        return
    yield Heading(3, "Wrong answers of the sparse server")
    yield Table(["tokens", "depth", "right answer", "its answer"], wrong[:MAX_WRONG])
    yield Text(f"{min(MAX_WRONG, len(wrong))} of {len(wrong)}; {FILE_NAME} has all.")


def _needle_table(rows: Sequence[EvalRow]) -> Table:
    lengths = sorted({row.tokens for row in rows})
    depths = sorted({row.depth for row in rows if row.depth is not None})
    scores = {(row.side, row.depth, row.tokens): row.score for row in rows}
    lines = [
        [f"{depth:.0%}", *(_pair([scores.get((side, depth, length)) for side in SIDES]) for length in lengths)]
        for depth in depths
    ]

    def mean(side: Side, length: int) -> float | None:
        found = [row.score for row in rows if (row.side, row.tokens) == (side, length) and row.score is not None]
        return fmean(found) if found else None

    lines.append(["mean", *(_pair([mean(side, length) for side in SIDES]) for length in lengths)])
    return Table(["depth", *(f"{length:,} tokens" for length in lengths)], lines)


def _longbench(evaluation: Evaluation) -> Iterator[Block]:
    splits = [pair for pair in evaluation.pairs() if pair[1].suite == "longbench" and pair[1].task != ALL_QUESTIONS]
    if not splits:
        return
    yield Heading(2, "LongBench v2 by difficulty and length")
    header = ["questions", "number", "dense", "sparse", "unparsable, dense", "unparsable, sparse"]
    lines = [
        [sparse.task, str(sparse.questions)]
        + [_optional(row.score, ".3f") for row in (dense, sparse)]
        + [_optional(row.details.get("unparsable"), "d") for row in (dense, sparse)]
        for dense, sparse in splits
    ]
    yield Table(header, lines)


def _provenance(evaluation: Evaluation) -> Iterator[Block]:
    yield Heading(2, "Where the figures come from")
    for side in SIDES:
        rows = [row for row in evaluation.rows if row.side == side]
        told = {
            "server": [evaluation.servers[side]],
            "vLLM of the server": [row.server_version or "not told" for row in rows],
            "command": [row.command for row in rows],
            "commit": [row.commit for row in rows],
            "device of the machine that asked": [row.gpu for row in rows],
            "versions there": [", ".join(f"{name} {v}" for name, v in row.versions.items()) for row in rows],
            "settings": [f"{row.suite}: {_settings(row)}" for row in rows if row.settings],
            "seconds": [f"{sum({row.part: row.seconds for row in rows}.values()):.0f}"],
        }
        yield Heading(3, side)
        yield Table(["what", "which"], [[name, "; ".join(dict.fromkeys(values))] for name, values in told.items()])


def _settings(row: EvalRow) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.settings.items())


def _short_name(model: str) -> str:
    path = Path(model)
    return "reference model" if path == reference_model_path() else path.name


def _pair(scores: Sequence[float | None]) -> str:
    return " / ".join(_optional(score, ".2f") or "-" for score in scores)


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
