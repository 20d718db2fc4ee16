"""Queries that turn away are noticed, a fixed number of steps later, and only against those of the last selection."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from flashmemory_vllm.runtime.drift import QueryDrift
from flashmemory_vllm.runtime.queries import QueryRing
from flashmemory_vllm.runtime.shape import AttentionShape
from flashmemory_vllm.runtime.side_stream import SideStream

CPU = torch.device("cpu")
SHAPE = AttentionShape(("layer",), 3, 1, 8, 1.0, 16, torch.float32, CPU)
NUM_ANCHORS, NUM_ROWS = 2, 4


class Steps:
    """Runs steps in which each row's queries point where they are told to."""

    def __init__(self, threshold: float = 0.8, delay: int = 1) -> None:
        self.buffer = QueryRing(NUM_ANCHORS, NUM_ROWS, 1, SHAPE)
        self.drift = QueryDrift(threshold, delay, self.buffer, SideStream(CPU))
        self.step = 0

    def run(self, angles: Mapping[str, float], due: str = "") -> list[str]:
        """One step with a batch of these requests, some of them scored; who is known to have drifted before it.

        Args:
            angles: of each request's queries in their plane, in degrees.
            due: names of the requests that are scored with this step's queries.
        """
        self.step += 1
        drifted = self.drift.drifted(self.step)
        for row, angle in enumerate(angles.values()):
            self.buffer.all_rows[:, row] = turned(angle)
        rows = {name: row for row, name in enumerate(angles)}
        self.drift.compare(self.step, {name: rows[name] for name in due}, rows)
        return drifted


def turned(degrees: float) -> torch.Tensor:
    """A direction at an angle to the first axis, the same for each head."""
    direction = torch.zeros(SHAPE.head_dim)
    direction[0], direction[1] = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return direction


def test_a_row_that_turns_away_is_told_after_the_delay() -> None:
    steps = Steps(delay=2)
    steps.run({"a": 0, "b": 90}, due="ab")
    steps.run({"a": 30, "b": 20})
    told = [steps.run({"a": 30, "b": 90}) for _ in range(4)]
    assert told == [[], [], ["b"], []]


def test_without_a_delay_the_next_step_knows() -> None:
    steps = Steps(delay=0)
    steps.run({"a": 0}, due="a")
    steps.run({"a": 50})
    assert steps.run({"a": 0}) == ["a"]


def test_rows_are_known_by_their_requests() -> None:
    steps = Steps(delay=0)
    steps.run({"a": 0, "b": 90}, due="ab")
    steps.run({"b": 90, "c": 0, "a": 0})
    assert steps.run({"c": 80, "b": 0}) == []
    assert steps.run({}) == ["b"]


def test_what_was_seen_before_a_new_selection_is_not_held_against_it() -> None:
    steps = Steps(delay=2)
    steps.run({"a": 0}, due="a")
    steps.run({"a": 90})
    steps.run({"a": 90}, due="a")
    assert [steps.run({"a": 90}) for _ in range(4)] == [[]] * 4
    steps.run({"a": 0})
    assert [steps.run({"a": 90}) for _ in range(3)] == [[], [], ["a"]]


def test_a_request_that_is_gone_is_forgotten_and_its_place_is_free() -> None:
    steps = Steps(delay=1)
    for name in "abcdefgh":
        steps.run({name: 0}, due=name)
        steps.run({name: 90})
        steps.drift.forget([name, "unknown"])
    assert [steps.run({}) for _ in range(3)] == [[]] * 3


def test_heads_and_anchors_count_alike() -> None:
    steps = Steps(threshold=0.5, delay=0)
    steps.run({"a": 0, "b": 0}, due="ab")
    # Of the six heads of both anchors, two keep their direction in row 0, four in row 1.
    steps.buffer.all_rows[:] = 5 * turned(90)
    steps.buffer.all_rows[0, 0, :2] = steps.buffer.all_rows[1, 1, :2] = steps.buffer.all_rows[0, 1, :2] = 7 * turned(0)
    steps.drift.compare(2, {}, {"a": 0, "b": 1})
    assert steps.drift.drifted(3) == ["a"]


def test_warming_up_leaves_nothing_behind() -> None:
    steps = Steps(delay=3)
    steps.drift.warm_up()
    for name in ("a", "b", "c", "d"):
        steps.run({name: 0}, due=name)
    assert steps.run({"a": 0}) == []


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 180)), min_size=1, max_size=12), st.integers(0, 3))
def test_the_answer_is_the_cosine_with_the_last_selection(history: list[tuple[bool, float]], delay: int) -> None:
    steps = Steps(threshold=0.5, delay=delay)
    steps.run({"a": 0}, due="a")
    selected_at, wanted, told = [(1, 0.0)], [], []
    for step, (is_due, angle) in enumerate(history, 2):
        cosine = np.cos(np.radians(angle - selected_at[-1][1]))
        assume(abs(cosine - 0.5) > 1e-5)
        if is_due:
            selected_at.append((step, angle))
        elif cosine < 0.5:
            wanted.append((step, len(selected_at)))
        if steps.run({"a": angle}, due="a" if is_due else ""):
            told.append(step)
    told += [step for step in range(len(history) + 2, len(history) + 3 + delay) if steps.run({})]
    expected = [
        step + 1 + delay
        for step, count in wanted
        if not any(step < later <= step + delay for later, _ in selected_at[count:])
    ]
    assert told == expected
