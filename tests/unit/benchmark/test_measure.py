"""Figures are those of an engine whose schedule is known to the millisecond."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmemory_vllm.benchmark import measure as measuring
from flashmemory_vllm.benchmark.measure import DROPPED_STEPS, StepLog, Work
from tests.unit.benchmark.twins import DECODE_SECONDS, EngineTwin, make_work


def measure(engine: EngineTwin, work: Work) -> dict[str, Any]:
    return measuring.measure(engine, work, engine.clock)


def test_decode_is_timed_without_prefill() -> None:
    engine = EngineTwin()
    figures = measure(engine, make_work(prompt_lens=(100,) * 4, output_tokens=30))
    assert figures["decoding"] == figures["requests"] == 4
    assert figures["step_ms"] == figures["p50_ms"]
    # The first of the 30 tokens ends the last prefill
    assert figures["steps"] == 29 - DROPPED_STEPS
    for name in ("p50_ms", "p95_ms", "mean_ms"):
        assert figures[name] == pytest.approx(DECODE_SECONDS * 1e3)
    assert figures["decode_tokens_per_s"] == pytest.approx(4 / DECODE_SECONDS)
    # Four prefills of a second each, and nothing else, until the last first token
    assert figures["prefill_tokens_per_s"] == pytest.approx(400 / 4.0)


def test_requests_are_ended_when_all_have_decoded_together_long_enough() -> None:
    engine = EngineTwin()
    measure(engine, make_work(output_tokens=20, slack_tokens=1000))
    assert engine.aborted == 1
    assert engine.now == pytest.approx(2.0 + 19 * DECODE_SECONDS)


def test_an_engine_with_less_room_is_timed_at_what_it_holds() -> None:
    engine = EngineTwin(room=2)
    figures = measure(engine, make_work(prompt_lens=(100,) * 4, output_tokens=30))
    assert figures["decoding"] == 2
    assert figures["p50_ms"] == pytest.approx(DECODE_SECONDS * 1e3)
    assert engine.aborted == 0


@pytest.mark.parametrize(("flag", "forgets"), [("shared_prefix", 1), ("keep_prefixes", 0)])
def test_prefill_over_cached_prefixes_is_not_reported(flag: str, forgets: int) -> None:
    engine = EngineTwin()
    figures = measure(engine, make_work(**{flag: True}))
    assert figures["prefill_tokens_per_s"] is None
    assert engine.forgotten == forgets


def test_a_shared_prefix_is_computed_before_the_clock_starts() -> None:
    engine = EngineTwin()
    figures = measure(engine, make_work(shared_prefix=True))
    (shared,), prompts = engine.seen
    assert all(prompt[: len(shared)] == shared for prompt in prompts)
    # Two prefills and the decode steps; the first prefill, of the shared part, came before
    assert figures["seconds"] == pytest.approx(2.0 + 19 * DECODE_SECONDS)


def test_a_warm_up_has_other_prompts_and_does_not_count() -> None:
    engine = EngineTwin()
    figures = measure(engine, make_work(warm_ups=1))
    first, second = engine.seen
    assert first != second
    assert figures["seconds"] == pytest.approx(2.0 + 19 * DECODE_SECONDS)


def test_steps_near_a_selection_are_told_apart() -> None:
    engine = EngineTwin(selecting=(20, 40), counts=True)
    figures = measure(engine, make_work(output_tokens=60, keep_steps=True))
    assert len(figures["steps_ms"]) == 59 - DROPPED_STEPS
    slow = [index for index, span in enumerate(figures["steps_ms"]) if span > 20]
    assert len(slow) == 2
    near = {index + offset for index in slow for offset in (-2, -1, 0, 1, 2)}
    assert set(figures["selecting_steps"]) == near
    assert figures["other_p95_ms"] == pytest.approx(DECODE_SECONDS * 1e3)
    assert figures["selecting_p95_ms"] == pytest.approx(3 * DECODE_SECONDS * 1e3)
    assert figures["selections"] == 2
    assert figures["stall_share"] == pytest.approx(0.004 / (sum(figures["steps_ms"]) / 1e3))


def test_stock_has_step_times_and_no_selections() -> None:
    engine = EngineTwin()
    figures = measure(engine, make_work(keep_steps=True))
    assert "steps_ms" in figures
    assert "selecting_steps" not in figures
    assert figures["selections"] is None


def test_texts_are_compared_over_the_same_number_of_tokens() -> None:
    short, long = (
        measure(EngineTwin(), make_work(compare_outputs=True, output_tokens=tokens))["texts"] for tokens in (20, 21)
    )
    assert len(short) == 2
    assert short != long


@given(st.lists(st.frozensets(st.integers(0, 4), min_size=1), min_size=1, max_size=60))
def test_a_steady_step_has_as_many_requests_as_any_and_the_same_as_the_one_before(
    active: list[frozenset[int]],
) -> None:
    log = StepLog(0.0)
    for time, requests in enumerate(active):
        log.add(float(time), {request: [1] for request in requests})
    steady = log.steady_steps()
    assert all(active[step] == active[step - 1] for step in steady)
    assert all(len(active[step]) == max(map(len, active)) for step in steady)


def test_blocks_of_a_shared_beginning_count_once() -> None:
    room = {"output_tokens": 10, "slack_tokens": 6}
    assert make_work(prompt_lens=(144, 150), **room).num_blocks(16) == 10 + 11
    assert make_work(prompt_lens=(160, 160), **room, shared_prefix=True).num_blocks(16) == 22 - 9
