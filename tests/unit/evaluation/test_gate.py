"""The gate: what is judged, and what shows nothing."""

import pytest

from flashmemory_vllm.evaluation.eval_rows import SIDES, EvalRow, Evaluation
from flashmemory_vllm.evaluation.gate import Judged, Limits, judge, passes, unjudged, verdicts
from tests.unit.evaluation.eval_fakes import make_eval_row, make_loss_row


def evaluation_of(*rows: EvalRow) -> Evaluation:
    return Evaluation("m", {"dense": "d", "sparse": "s"}, rows)


def lines_of(*rows: EvalRow) -> list[Judged]:
    return judge(evaluation_of(*rows))


def test_depths_are_one_line_and_lengths_are_not() -> None:
    rows = [
        make_eval_row("dense", depth=0.0, right=[True, True]),
        make_eval_row("dense", depth=1.0, right=[True, False], score=0.5),
        make_eval_row("dense", tokens=8192, part="needles 8192"),
        make_eval_row("sparse", depth=0.0, right=[True, False], score=0.5),
        make_eval_row("sparse", depth=1.0, right=[False, True], score=0.5),
        make_eval_row("sparse", tokens=8192, part="needles 8192"),
    ]
    short, long = lines_of(*rows)
    assert (short.tokens, short.dense, short.sparse) == (4096, 0.75, 0.5)
    assert short.relative == pytest.approx(2 / 3)
    assert (short.lost, short.gained, short.questions) == (2, 1, 8)
    assert (long.tokens, long.relative, long.lost) == (8192, 1.0, None)
    assert short.name == "needles needle at 4,096 tokens"


def test_rows_of_one_side_and_of_other_questions_are_not_judged() -> None:
    assert lines_of(make_eval_row("dense"), make_eval_row("sparse", settings={"seed": 1})) == []
    assert lines_of(make_eval_row("sparse")) == []


def test_splits_of_longbench_are_not_judged() -> None:
    rows = [
        make_eval_row(side, suite="longbench", task=task, part="longbench", depth=None)
        for side in ("dense", "sparse")
        for task in ("all", "easy", "long")
    ]
    assert [line.task for line in lines_of(*rows)] == ["all"]


@pytest.mark.parametrize(
    ("dense", "sparse", "share", "verdict", "passed"),
    [
        (1.0, 0.99, 0.1, "pass", True),
        (1.0, 0.98, 0.1, "fail", False),
        (0.5, 0.6, None, "pass", True),
        (1.0, 1.0, 1.0, "not sparse", False),
        (0.0, 0.0, 0.1, "dense fails", False),
    ],
)
def test_verdicts(dense: float, sparse: float, share: float | None, verdict: str, passed: bool) -> None:
    """A gate that has judged nothing does not pass."""
    found = evaluation_of(
        make_eval_row("dense", score=dense), make_eval_row("sparse", score=sparse, resident_share=share)
    )
    assert list(verdicts(found, Limits(0.99)).values()) == [verdict]
    assert passes(found, Limits(0.99)) is passed


def test_one_line_that_fails_fails_all() -> None:
    rows = [
        make_eval_row(side, part=part, tokens=n) for side in ("dense", "sparse") for part, n in (("a", 1), ("b", 2))
    ]
    assert passes(evaluation_of(*rows), Limits(1.0))
    failing = evaluation_of(*rows[:3], make_eval_row("sparse", part="b", tokens=2, score=0.5))
    assert not passes(failing, Limits(0.99))
    assert not passes(evaluation_of(), Limits(0.99))
    assert passes(failing, Limits()), "nothing is asked"


def test_every_limit_has_to_have_judged_something() -> None:
    scores = [make_eval_row(side) for side in SIDES]
    losses = [make_loss_row(side, 2.0) for side in SIDES]
    both = Limits(0.99, 0.1)
    assert passes(evaluation_of(*scores, *losses), both)
    for rows, missing in ((scores, Limits(max_loss=0.1)), (losses, Limits(0.99))):
        assert not passes(evaluation_of(*rows), both)
        assert unjudged(evaluation_of(*rows), both) == [missing]


@pytest.mark.parametrize("worse_first", [False, True])
def test_a_loss_that_fails_is_not_hidden_by_one_on_other_texts(worse_first: bool) -> None:
    rows = [
        make_loss_row(side, 2.5 if worse and side == "sparse" else 2.0, settings={"documents": documents})
        for documents, worse in ((2, worse_first), (4, not worse_first))
        for side in SIDES
    ]
    assert verdicts(evaluation_of(*rows), Limits(max_loss=0.1)) == {"loss at 4,096 tokens": "fail"}


@pytest.mark.parametrize(
    ("gap", "share", "verdict"),
    [(0.05, 0.1, "pass"), (0.051, 0.1, "fail"), (-1.0, None, "pass"), (0.0, 1.0, "not sparse")],
)
def test_a_loss_is_judged_by_what_it_is_above_the_dense_one(gap: float, share: float | None, verdict: str) -> None:
    rows = [make_loss_row("dense", 2.0), make_loss_row("sparse", 2.0 + gap, resident_share=share)]
    evaluation = evaluation_of(*rows)
    found = verdicts(evaluation, Limits(max_loss=0.05 + 1e-9))
    assert found == {"loss at 4,096 tokens": verdict}
    assert verdicts(evaluation, Limits(min_relative=0.99)) == {}


def test_limits_tell_what_they_ask_for() -> None:
    assert Limits().told == ""
    told = Limits(0.99, 0.1).told
    assert told == "0.99 of the dense score or more and a loss of at most 0.1 nats a token above dense"
