"""The strip of a request tells what its last row read, and where everything else is."""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flashmemory_vllm.residency.plan import StepPlan
from flashmemory_vllm.residency.types import NewRequest
from flashmemory_vllm.runtime.history import SelectionHistory
from flashmemory_vllm.runtime.status import RequestStatus, RuntimeStatus, StripsAsked, run_lengths, runtime_status
from tests.unit.residency.driver import BLOCK, Driver
from tests.unit.runtime.fences import FencesTwin

READ = {"resident", "recalled", "sink", "recent"}
ALL = StripsAsked(1000)


class Observed:
    """A driven planner whose steps are noted as the runtime notes them."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.history = SelectionHistory(driver.planner, FencesTwin())

    def step(self, **tokens: int) -> StepPlan:
        plan = self.driver.step(tokens=tokens)
        self.history.note(plan)
        return plan

    def status(self) -> RuntimeStatus:
        return RuntimeStatus.model_validate(runtime_status(self.driver.planner, self.history, str.upper, ALL))

    def states(self, group: int = 0) -> list[str]:
        """Of the one request that there is."""
        (request,) = self.status().requests
        return expand(request, group)


def expand(request: RequestStatus, group: int = 0) -> list[str]:
    assert request.strips is not None
    return [state for state, count in request.strips[group] for _ in range(count)]


def decoding(max_prefetches: int = 1, num_groups: int = 1, fallback_share: float | None = None) -> Observed:
    """One request with 12 full blocks and one begun that decodes with 3, 5 and 7; nothing else has a slot."""
    driver = Driver(40, num_groups, 50, 0.4, max_prefetches=max_prefetches, fallback_share=fallback_share)
    observed = Observed(driver)
    driver.prefill("a", 12, spare_blocks=20)
    driver.offer("a", 12, best=[3, 5, 7])
    observed.step(a=1)
    driver.prefill("filler", 34, first_block=100, spare_blocks=0)
    driver.step(finished=["filler"])
    return observed


def test_an_idle_worker_has_sizes_only() -> None:
    status = Observed(Driver(num_slots=40)).status()
    assert (status.step, status.block_size, status.requests, status.selections) == (0, 4, [], [])
    assert status.memory.model_dump() == {
        "slots_used": 0,
        "slots_pinned": 0,
        "slots_total": 39,
        "host_blocks_used": 0,
        "host_blocks_total": 199,
    }


def test_a_prompt_under_way_holds_what_it_writes() -> None:
    observed = Observed(Driver(num_slots=40))
    plan = observed.driver.step([NewRequest("a", tuple(range(1, 13)), 0, 48)], a=22)
    observed.history.note(plan)
    (request,) = observed.status().requests
    assert (request.phase, request.num_tokens, request.prefill_tokens, request.num_blocks) == ("prefill", 22, 48, 6)
    assert (request.request_id, request.engine_request_id, request.selection_step) == ("A", "a", None)
    assert request.strips == [[("resident", 6)]]


def test_a_sparse_request_has_a_frame_and_chosen_blocks() -> None:
    observed = decoding()
    (request,) = observed.status().requests
    assert (request.phase, request.resident_blocks, request.selection_step) == ("decode", 5, 2)
    assert expand(request) == [
        *("sink", "evicted", "evicted", "resident", "evicted", "resident", "evicted", "resident"),
        *("evicted", "evicted", "evicted", "evicted", "recent"),
    ]


def test_a_request_tells_how_it_decodes_and_why() -> None:
    driver = Driver(60, ratio=0.4, min_sparse=12, tau=50, fallback_share=0.5)
    observed = Observed(driver)
    driver.prefill("a", 12)
    driver.prefill("short", 2, first_block=50)
    told = []
    for _ in range(2):
        driver.offer("a", 12, best=[3])
        observed.step(a=1, short=BLOCK)
        told.append([(request.mode, request.reason) for request in observed.status().requests])
    assert told == [
        [("sparse", None), ("dense", "ratio_keeps_all")],
        [("dense", "score_share"), ("sparse", None)],
    ]
    driver.prefill("shorter", 1, first_block=60)
    (_, _, shorter) = observed.status().requests
    assert (shorter.mode, shorter.reason) == ("dense", "below_min_sparse_tokens")


def test_blocks_that_a_selection_brings_are_recalled_and_those_that_go_stay_cached() -> None:
    observed = decoding()
    observed.driver.offer("a", 12, best=[9, 10, 3])
    seen = []
    for _ in range(2):
        observed.step(a=1)
        states = observed.states()
        seen.append({position: states[position] for position in (3, 5, 7, 9, 10)})
    # The second one comes a step later, as only one may at a time
    assert seen == [
        {3: "resident", 5: "resident", 7: "cached", 9: "recalled", 10: "evicted"},
        {3: "resident", 5: "cached", 7: "cached", 9: "recalled", 10: "resident"},
    ]


def test_only_who_is_asked_for_has_strips() -> None:
    driver = Driver(num_slots=40)
    observed = Observed(driver)
    for index, name in enumerate("abc"):
        driver.prefill(name, 2, first_block=1 + 10 * index)

    def strips(asked: StripsAsked) -> dict[str, bool]:
        told = RuntimeStatus.model_validate(runtime_status(driver.planner, observed.history, str, asked))
        return {request.request_id: request.strips is not None for request in told.requests}

    assert strips(StripsAsked()) == {"a": False, "b": False, "c": False}
    assert strips(StripsAsked(2)) == {"a": True, "b": True, "c": False}
    assert strips(StripsAsked(0, "c")) == {"a": False, "b": False, "c": True}


def test_the_answer_is_plain_json() -> None:
    observed = decoding(num_groups=2)
    told = runtime_status(observed.driver.planner, observed.history, str.upper, ALL)
    assert RuntimeStatus.model_validate(json.loads(json.dumps(told))) == observed.status()
    assert len(told["requests"][0]["strips"]) == 2


@given(
    rounds=st.lists(st.tuples(st.permutations(range(12)), st.integers(1, 6)), min_size=1, max_size=6),
    max_prefetches=st.integers(1, 4),
    num_groups=st.integers(1, 2),
    fallback_share=st.sampled_from([None, 0.0]),
)
def test_what_is_shown_as_read_is_what_the_last_row_read(
    rounds: Sequence[tuple[Sequence[int], int]], max_prefetches: int, num_groups: int, fallback_share: float | None
) -> None:
    observed = decoding(max_prefetches, num_groups, fallback_share)
    planner = observed.driver.planner
    for ranking, num_steps in rounds:
        observed.driver.offer("a", 12, best=ranking)
        for _ in range(num_steps):
            plan = observed.step(a=1)
            lut = planner.lut
            for group, states in enumerate(all_states(observed, num_groups)):
                is_read = np.isin(states, list(READ))
                assert np.flatnonzero(is_read).tolist() == sorted(plan.rows["a"].positions[group].tolist())
                # Logical blocks of the driver's request follow each other from 1 on.
                has_slot = lut[group, 1 : 1 + len(states)] >= 0
                assert (has_slot == ~np.isin(states, ["evicted"])).all()


def all_states(observed: Observed, num_groups: int) -> Iterator[list[str]]:
    return (observed.states(group) for group in range(num_groups))


@given(st.lists(st.integers(0, 5), max_size=200))
def test_run_lengths_keep_every_block_and_merge_equal_ones(codes: list[int]) -> None:
    runs = run_lengths(np.array(codes, np.int32))
    expanded = [state for state, count in runs for _ in range(count)]
    assert len(expanded) == len(codes)
    assert all(left[0] != right[0] for left, right in pairwise(runs))
    by_code = dict(zip(codes, expanded, strict=True))
    assert expanded == [by_code[code] for code in codes]
    assert len(set(by_code.values())) == len(by_code)
