"""Whatever vLLM's own scheduler may legally do, the planner has an answer to: no step raises, no read is wrong."""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from vllm.config import VllmConfig

from flashmemory_vllm.observability.counters import CounterReader, CounterWriter, worker_name
from flashmemory_vllm.residency.budget import BudgetPolicy, Mode
from tests.helpers.tiny_model import save_tiny_llama
from tests.integration.plugin.scheduled import VOCABULARY, Engine, Sizes, make_config, next_token

BLOCK = 4
# FLASHMEMORY_HISTORIES=thorough runs for many minutes
NUM_HISTORIES = 200 if os.environ.get("FLASHMEMORY_HISTORIES") == "thorough" else 3
POLICY = BudgetPolicy(BLOCK, 0.3, 0, BLOCK, BLOCK, 16, 160, 8)
SIZES = Sizes(POLICY, POLICY.worst_case() + 12, 90)
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    return make_config(save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", num_layers=1))


@pytest.fixture
def make_engine(config: VllmConfig, tmp_path: Path) -> Iterator[MakeEngine]:
    made: list[Engine] = []

    def make(sizes: Sizes = SIZES, seed: int = 0) -> Engine:
        made.append(Engine(sizes, config, tmp_path / f"flashmemory-test-{len(made)}", seed))
        return made[-1]

    yield make
    for engine in made:
        engine.manager._counters.close()


def prompt(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCABULARY) for _ in range(num_tokens)]


def says(tokens: list[int], count: int) -> list[int]:
    """What follows the tokens."""
    said: list[int] = []
    for _ in range(count):
        said.append(next_token([*tokens, *said]))
    return said


@pytest.mark.parametrize("is_v2", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
# The first turn ends within a block, or on the boundary of one
@pytest.mark.parametrize("first", [21, 17])
def test_a_session_goes_on_where_it_stopped(make_engine: MakeEngine, first: int, is_async: bool, is_v2: bool) -> None:
    engine = make_engine(replace(SIZES, is_async=is_async, is_v2=is_v2))
    engine.add("plain", prompt(9, 50), 30)
    turns = [prompt(1, first), prompt(2, 33), prompt(3, 2)]
    context: list[int] = []
    for turn in turns:
        engine.outputs["s"] = []
        engine.add("s", turn, 4, resumable=True)
        while len(engine.outputs["s"]) < 4:
            engine.step()
        context += turn
        assert engine.outputs["s"] == says(context, 4)
        context += says(context, 3)  # the last one of a turn is discarded
    engine.add("s", [0])
    engine.run()
    assert engine.outputs["plain"] == says(prompt(9, 50), 30)
    engine.check_nothing_is_left()


def test_a_session_that_waits_for_its_client_holds_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("s", prompt(1, 40), 2, resumable=True)
    while len(engine.outputs.get("s", [])) < 2:
        engine.step()
    engine.step()
    assert engine.manager._ledger.reserved == 0
    assert engine.worker.planner.usage().slots_pinned == 0
    # The whole of the memory is others'
    engine.add("long", prompt(2, 150), 8)
    engine.step()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.add("s", prompt(3, 5), 2, resumable=True)
    engine.run()
    assert len(engine.outputs["s"]) == 4
    assert engine.outputs["long"] == says(prompt(2, 150), 8)
    engine.abort("s")
    engine.run()
    engine.check_nothing_is_left()


class Client:
    """Sends whatever clients may send, at random."""

    def __init__(self, engine: Engine, rng: random.Random, num_requests: int) -> None:
        self.engine, self.rng = engine, rng
        self.left = num_requests
        self.plain: dict[str, tuple[list[int], int]] = {}
        self.sessions: dict[str, int] = {}
        self.aborted: set[str] = set()

    def act(self) -> None:
        """Perhaps one thing of each kind."""
        rng = self.rng
        if self.left and rng.random() < 0.4:
            self.left -= 1
            self._begin(f"r{self.left}")
        for name, turns in list(self.sessions.items()):
            if rng.random() < 0.15:
                self._go_on(name, turns)
        if rng.random() < 0.03 and self.engine.scheduler.requests:
            name = rng.choice(list(self.engine.scheduler.requests))
            self.aborted.add(name)
            self.sessions.pop(name, None)
            self.engine.abort(name)
        if rng.random() < 0.02:
            assert self.engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    @property
    def is_done(self) -> bool:
        return not self.left and not self.sessions

    def _begin(self, name: str) -> None:
        rng = self.rng
        # Of three prompts that others have too, as n > 1 does, and of beginnings of them
        whole = prompt(rng.randrange(3), 100)
        tokens = whole[: rng.choice([100, 64, 32, rng.randint(1, 100)])] + prompt(self.left, rng.choice([0, 0, 1, 20]))
        if rng.random() < 0.3:
            self.sessions[name] = rng.randint(0, 2)
            self.engine.add(name, tokens[:40], rng.randint(1, 6), rng.randrange(3), resumable=True)
        else:
            self.plain[name] = tokens, rng.choice([1, 12, 40])
            self.engine.add(name, tokens, self.plain[name][1], rng.randrange(3))

    def _go_on(self, name: str, turns: int) -> None:
        if not turns:
            del self.sessions[name]
            self.engine.add(name, [0])
            return
        self.sessions[name] -= 1
        self.engine.add(name, prompt(turns, self.rng.randint(1, 30)), self.rng.randint(1, 6), resumable=True)


@pytest.mark.parametrize("scheduling", ["fcfs", "priority"])
@pytest.mark.parametrize("is_v2", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("mode", "window", "state_block"), [("always", 0, 0), ("pressure", 0, 0), ("always", 14, 0), ("always", 0, 12)]
)
def test_no_event_of_the_scheduler_ends_the_engine(
    make_engine: MakeEngine, scheduling: str, mode: Mode, window: int, state_block: int, is_async: bool, is_v2: bool
) -> None:
    policy = replace(POLICY, mode=mode)
    # Few blocks: requests are preempted all the time
    tight = Sizes(
        policy, policy.worst_case() + 6, 50, 6, 5, scheduling, is_async, is_v2, window=window, state_block=state_block
    )
    for seed in range(NUM_HISTORIES):
        engine = make_engine(replace(tight, caching=seed % 4 != 3), seed)
        client = Client(engine, random.Random(seed), 12)
        while not client.is_done:
            client.act()
            engine.step()
        engine.run()
        for name in client.plain.keys() - client.aborted:
            tokens, count = client.plain[name]
            assert engine.outputs[name] == says(tokens, count), (seed, name)
        engine.check_nothing_is_left()
        assert engine.worker.num_questions > 0


@pytest.mark.parametrize(
    ("num_native_blocks", "lost"),
    # Enough for the windows of one request beside those of the first prompt, or not
    [(200, 0), (14, 92)],
)
def test_prefix_hits_that_end_early_for_want_of_windows_are_counted(
    make_engine: MakeEngine, num_native_blocks: int, lost: int
) -> None:
    """What the host still holds of a prompt is of no use without the window at its end."""
    sizes = Sizes(POLICY, 60, 200, window=14, num_native_blocks=num_native_blocks)
    engine = make_engine(sizes, 0)

    def counted() -> dict[str, float]:
        return CounterReader(engine.manager._counters.path.parent).read()

    with CounterWriter.create(engine.manager._counters.path.parent, worker_name(0)):
        assert (counted()["native_blocks_total"], counted()["native_blocks_used"]) == (num_native_blocks - 1, 0)
        for name, number in [("first", 1), ("other", 2), ("third", 3)]:
            engine.add(name, prompt(number, 100), 4)
            engine.step()
            assert 0 < counted()["native_blocks_used"] < num_native_blocks
            engine.run()
        assert counted()["lost_prefix_tokens_total"] == 0
        engine.add("again", prompt(1, 100), 4)
        engine.run()
        assert counted()["lost_prefix_tokens_total"] == lost
        assert counted()["native_blocks_used"] == 0
    assert engine.outputs["again"] == engine.outputs["first"]
