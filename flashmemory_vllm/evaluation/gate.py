"""Whether a sparse server is good enough: its scores as shares of the dense ones, and its loss above the dense one."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from flashmemory_vllm.evaluation.eval_rows import EvalRow, Evaluation, SuiteName
from flashmemory_vllm.evaluation.loss import LossLine, loss_lines

JUDGED: tuple[SuiteName, ...] = ("needles", "ruler", "longbench")
ALL_QUESTIONS = "all"
Verdict = Literal["pass", "fail", "not sparse", "dense fails"]
_WORST_FIRST: tuple[Verdict, ...] = ("fail", "pass", "dense fails", "not sparse")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a sparse server must keep; None is not asked for.

    Attributes:
        min_relative: share of the dense score, on every line of scores.
        max_loss: nats a token above the dense loss, on every line of losses.
    """

    min_relative: float | None = None
    max_loss: float | None = None

    @property
    def told(self) -> str:
        """What is asked for, in words; empty if nothing is."""
        asked = [] if self.min_relative is None else [f"{self.min_relative:g} of the dense score or more"]
        asked += [] if self.max_loss is None else [f"a loss of at most {self.max_loss:g} nats a token above dense"]
        return " and ".join(asked)


@dataclass(frozen=True, slots=True)
class Judged:
    """One line of the gate.

    Attributes:
        suite: name of the suite.
        task: name of the task.
        tokens: tokens of a prompt.
        questions: how many were asked.
        dense: score of the dense server, 0 to 1; of needles the mean over the depths.
        sparse: that of the sparse one.
        lost: questions that only the dense one answered, where answers are right or wrong.
        gained: questions that only the sparse one answered.
        resident_share: see `EvalRow`.
        is_sparse: whether decode steps left out blocks.
    """

    suite: SuiteName
    task: str
    tokens: int
    questions: int
    dense: float
    sparse: float
    lost: int | None
    gained: int | None
    resident_share: float | None
    is_sparse: bool

    @property
    def relative(self) -> float | None:
        """Score over the dense score; None if that is 0."""
        return self.sparse / self.dense if self.dense else None

    @property
    def name(self) -> str:
        """What was judged, in words."""
        return f"{self.suite} {self.task} at {self.tokens:,} tokens"

    def verdict(self, min_relative: float) -> Verdict:
        """Whether the sparse server keeps so much of the dense score.

        Nothing is shown by decode steps that left out no block, nor by questions that dense attention cannot answer.
        """
        if not self.is_sparse:
            return "not sparse"
        if self.relative is None:
            return "dense fails"
        return "pass" if self.relative >= min_relative else "fail"


def judge(evaluation: Evaluation) -> list[Judged]:
    """Lines for each length of the needles, each task and length of RULER, and all questions of LongBench."""
    groups: dict[tuple[SuiteName, str, int], list[tuple[EvalRow, EvalRow]]] = {}
    for dense, sparse in evaluation.pairs():
        is_split = sparse.suite == "longbench" and sparse.task != ALL_QUESTIONS
        if sparse.suite in JUDGED and not is_split:
            groups.setdefault((sparse.suite, sparse.task, sparse.tokens), []).append((dense, sparse))
    return [_judged(*key, pairs) for key, pairs in groups.items()]


def loss_verdict(line: LossLine, max_loss: float) -> Verdict:
    """Whether a sparse server loses no more. Nothing is shown by decode steps that left out no block."""
    if not line.is_sparse:
        return "not sparse"
    return "pass" if line.gap <= max_loss else "fail"


def verdicts(evaluation: Evaluation, limits: Limits) -> dict[str, Verdict]:
    """By name, of all that the limits ask about. What was measured in several ways fails if it fails in one."""
    found: dict[str, Verdict] = {}
    lines: list[tuple[str, Verdict]] = []
    if limits.min_relative is not None:
        lines += [(line.name, line.verdict(limits.min_relative)) for line in judge(evaluation)]
    if limits.max_loss is not None:
        lines += [(line.name, loss_verdict(line, limits.max_loss)) for line in loss_lines(evaluation)]
    for name, verdict in lines:
        found[name] = min(verdict, found.get(name, verdict), key=_WORST_FIRST.index)
    return found


def unjudged(evaluation: Evaluation, limits: Limits) -> list[Limits]:
    """Those limits by which nothing could be judged: a gate that asks for them has not been passed."""
    alone = [Limits(limits.min_relative), Limits(max_loss=limits.max_loss)]
    return [one for one in alone if one.told and not {"pass", "fail"} & set(verdicts(evaluation, one).values())]


def passes(evaluation: Evaluation, limits: Limits) -> bool:
    """Whether something was judged by every limit, and nothing failed."""
    return not unjudged(evaluation, limits) and "fail" not in verdicts(evaluation, limits).values()


def _judged(suite: SuiteName, task: str, tokens: int, pairs: Sequence[tuple[EvalRow, EvalRow]]) -> Judged:
    outcomes = [
        (one, two)
        for dense, sparse in pairs
        if dense.right is not None and sparse.right is not None
        for one, two in zip(dense.right, sparse.right, strict=True)
    ]
    first = pairs[0][1]
    return Judged(
        suite=suite,
        task=task,
        tokens=tokens,
        questions=sum(sparse.questions for _, sparse in pairs),
        dense=fmean(dense.score or 0.0 for dense, _ in pairs),
        sparse=fmean(sparse.score or 0.0 for _, sparse in pairs),
        lost=sum(one and not two for one, two in outcomes) if outcomes else None,
        gained=sum(two and not one for one, two in outcomes) if outcomes else None,
        resident_share=first.resident_share,
        is_sparse=first.is_sparse,
    )
