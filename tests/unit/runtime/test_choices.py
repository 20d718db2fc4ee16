"""A choice for many requests at once makes of each what ranking its scores makes; requests may come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import torch

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.indexer import IndexGeometry, Selector, create_selector, shares
from flashmemory_vllm.indexer.exact import ExactSelector
from tests.helpers.alone import Alone, ScoringSelector
from tests.helpers.indexers import save_untrained
from tests.unit.runtime.choosing import BLOCK, HKV, HQ, A, D, Request, World

MakeSelector = Callable[[IndexGeometry], Selector]
TAU = 3
# By what a selector is made with beside the geometry
POLICIES: dict[str, dict[str, object]] = {
    "exact": {},
    "exact mean": {"aggregate": "mean"},
    "exact fp8": {"index_dtype": "fp8"},
    "bounds": {},
    "mean": {},
    "h2o": {},
    "h2o mean": {"aggregate": "mean"},
    "h2o fp8": {"index_dtype": "fp8"},
    "streaming": {},
    "random": {"seed": 5},
    "neural": {},
    "neural that forecasts": {},
}


@pytest.fixture(scope="module")
def indexers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By policy; a forecast's channels do not depend on how long ago a token was, so that its twin needs no clock."""
    folder = tmp_path_factory.mktemp("indexer")
    sizes = {"num_layers": 6, "num_query_heads": HQ, "head_dim": D, "block_size": BLOCK, "chunk_size": 4}
    spec = sizes | {"anchor_layers": (1, 3, 4), "threshold": 0.0, "forecast_threshold": 0.0}
    decays = {"neural": (), "neural that forecasts": (0.0, 1.0)}
    return {
        policy: str(save_untrained(folder / f"{len(own)}.safetensors", memory_decays=own, **spec))
        for policy, own in decays.items()
    }


def maker(policy: str, indexers: dict[str, str]) -> MakeSelector:
    name, options = policy.split(maxsplit=1)[0], dict(POLICIES[policy])
    if policy in indexers:
        options["indexer"] = indexers[policy]
    return lambda geometry: create_selector(name, geometry, **options)


def same(world: World, requests: dict[str, Request]) -> None:
    for request in requests.values():
        if request.sets:
            assert request.sets == request.twin_sets, request.name
            assert world.device_sets(request) == request.chosen


@pytest.mark.parametrize("groups", [(0, 0, 0), (1, 0, 1)])
@pytest.mark.parametrize("policy", POLICIES)
def test_sets_are_those_of_ranked_scores(policy: str, groups: tuple[int, ...], indexers: dict[str, str]) -> None:
    world = World(maker(policy, indexers), groups)
    requests = {
        "a": world.start("a", 2, prompt_len=93, want=4),
        "b": world.start("b", 0, prompt_len=75, want=3),
    }
    window = 4
    for request in requests.values():
        world.twin_scored(request, window)
        world.twin_chosen(request)
    world.choose(*map(world.asked, requests.values()), requests=requests, window=window)
    same(world, requests)
    for step in range(18):
        rows = []
        if step == 6:
            requests["c"] = world.start("c", 3, prompt_len=50, want=2)
            world.twin_scored(requests["c"])
            world.twin_chosen(requests["c"])
            rows.append(world.asked(requests["c"]))
        for offset, name in enumerate("ab"):
            request = requests[name]
            began = world.grow(request, 1)
            if (step + offset) % TAU == 0:
                world.twin_scored(request)
                world.twin_chosen(request)
                rows.append(world.asked(request, at_once=step % 2 == 0))
            elif began:
                world.twin_shrunk(request)
                rows.append(world.asked(request, scored=False, cap=0))
        world.choose(*rows, requests=requests)
        same(world, requests)
    assert world.queue.failures == dict.fromkeys(world.queue.failures, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_request_that_comes_back_is_chosen_for_with_what_its_question_asked(
    policy: str, indexers: dict[str, str]
) -> None:
    world = World(maker(policy, indexers))
    request, other = world.start("a", 2, prompt_len=93, want=4), world.start("b", 1, prompt_len=60, want=2)
    requests, window = {"a": request, "b": other}, 4
    for one in requests.values():
        world.twin_scored(one, window)
        world.twin_chosen(one)
    world.choose(*map(world.asked, requests.values()), requests=requests, window=window)
    for place in (3, 0):
        for _ in range(5):
            world.grow(request, 2)
            world.twin_scored(request)
            world.twin_chosen(request)
            world.choose(world.asked(request), requests=requests)
        world.grow(request, 1)
        # Somebody else was at the place before
        world.state.known[place] = world.queue._known[place] = 3
        world.move(request, place)
        newest = [world.query(request, request.num_tokens - 1), *world.question(request, window)]
        world.twin_scored(request, newest=newest)
        world.twin_chosen(request)
        world.choose(world.asked(request), requests=requests, window=window)
        same(world, requests)
        inner = world.selector.memory_kind.num_inner
        remembered = world.state.places.memory[inner:, :, place, : request.num_full].amax(0)
        assert request.worth is not None
        torch.testing.assert_close(remembered, request.worth, rtol=1e-4, atol=1e-6)
    world.queue.forget(["a", "nobody"])


@pytest.mark.parametrize("scratch", [None, 1])
@pytest.mark.parametrize(
    ("name", "options"), [("exact", {"index_dtype": "fp8"}), ("exact", {"question_share": 2.0}), ("mean", {})]
)
def test_a_memory_is_of_all_tokens_in_any_portions(
    name: str, options: dict[str, object], scratch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes over queries, and a row at a time, make of it what a loop over tokens does."""
    if scratch is not None:
        monkeypatch.setattr(shares, "SCRATCH_ELEMS", scratch)
    decay = 0.8
    world = World(lambda geometry: create_selector(name, geometry, memory_decay=decay, **options), num_kept=8)
    requests = {"a": world.start("a", 2, prompt_len=100, want=4), "b": world.start("b", 0, prompt_len=70, want=4)}
    memory: dict[str, torch.Tensor] = {}
    asked: dict[str, torch.Tensor] = {}
    for request in requests.values():
        world.twin_scored(request, 7)
        memory[request.name] = asked[request.name] = world.twin.remembered(request.name)[0]
    world.choose(*map(world.asked, requests.values()), requests=requests, window=7)
    for _ in range(4):
        rows = []
        for request, count in zip(requests.values(), (7, 2), strict=True):
            world.grow(request, count)
            for age in reversed(range(count)):
                request.selections = 0
                world.twin_scored(request, newest=[world.query(request, request.num_tokens - 1 - age)])
                known = memory[request.name]
                memory[request.name] = world.twin.remembered(request.name)[0].clone()
                grown = memory[request.name][:, : known.shape[1]]
                torch.maximum(grown, known * decay, out=grown)
            rows.append(world.asked(request))
        world.choose(*rows, requests=requests)
        for request in requests.values():
            found, *others = world.state.places.memory[:, :, request.place, : request.num_full]
            torch.testing.assert_close(found, memory[request.name], rtol=1e-4, atol=1e-6)
            request.worth = found.clone()
            for other in others:
                question = torch.nn.functional.pad(
                    asked[request.name], (0, other.shape[1] - asked[request.name].shape[1])
                )
                torch.testing.assert_close(other, question, rtol=1e-4, atol=1e-6)
                request.worth += 2 * other
            world.twin_chosen(request)
        same(world, requests)


class FailingSelector(ScoringSelector):
    """Likes old blocks; fails from the second selection of a request on."""

    name = "failing"
    needs_queries = True
    needs_keys = False

    def score(self, request: Alone) -> torch.Tensor:
        scores = 1000 - torch.arange(float(len(request.block_ids))).unsqueeze(0)
        return self.fail(scores) if request.step_index and request.req_id == "a" else scores

    def fail(self, scores: torch.Tensor) -> torch.Tensor:
        raise KeyError(f"no weight for {tuple(scores.shape)}")


class FiniteSelector(FailingSelector):
    """Never gives numbers that are none, so that the host keeps account of what memories know."""

    is_finite = True


class NanSelector(FailingSelector):
    def fail(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, torch.nan)


class InfinitySelector(FailingSelector):
    def fail(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.cat((scores[:, :-1] * 0, torch.full((1, 1), torch.inf)), 1)


class ShortSelector(FailingSelector):
    def fail(self, scores: torch.Tensor) -> torch.Tensor:
        return scores[:, 1:]


@pytest.mark.parametrize(
    ("selector", "reason", "num_failed"),
    [
        (FailingSelector, "exception", 17),
        (FiniteSelector, "exception", 17),
        (NanSelector, "not_finite", 9),
        (InfinitySelector, "not_finite", 9),
        (ShortSelector, "exception", 17),
    ],
)
def test_what_a_selector_does_wrong_leaves_sets_as_they_are(
    selector: type[Selector], reason: str, num_failed: int
) -> None:
    world = World(selector)
    requests = {"a": world.start("a", 2, prompt_len=93, want=4), "b": world.start("b", 0, prompt_len=60, want=4)}
    world.choose(*map(world.asked, requests.values()), requests=requests)
    assert requests["a"].chosen == requests["b"].chosen == [{1, 2, 3, 4}]
    world.choose(world.asked(requests["a"]), requests=requests)
    assert requests["a"].chosen == [{1, 2, 3, 4}]
    for _ in range(8):
        for request in requests.values():
            world.grow(request, BLOCK)
        world.choose(*map(world.asked, requests.values()), requests=requests)
    # Blocks begun since then are newer than what is known
    assert requests["a"].chosen == world.device_sets(requests["a"]) == [{15, 16, 17, 18}]
    assert world.queue.failures == dict.fromkeys(world.queue.failures, 0) | {reason: num_failed}
    if num_failed == 9:
        assert requests["b"].chosen == world.device_sets(requests["b"]) == [{1, 2, 3, 4}]


@pytest.mark.parametrize("selector", [FailingSelector, NanSelector])
def test_one_that_fails_at_once_leaves_the_newest_blocks(selector: type[Selector]) -> None:
    at_once = type(
        "AtOnce", (selector,), {"score": lambda self, request: self.fail(torch.ones(1, len(request.block_ids)))}
    )
    world = World(at_once)
    requests = {"a": world.start("a", 2, prompt_len=93, want=4)}
    world.choose(world.asked(requests["a"]), requests=requests)
    assert requests["a"].chosen == world.device_sets(requests["a"]) == [{7, 8, 9, 10}]
    assert sum(world.queue.failures.values()) == 1


class RecordingSelector(FailingSelector):
    asked: ClassVar[list[Alone]] = []

    def score(self, request: Alone) -> torch.Tensor:
        self.asked.append(request)
        return torch.zeros(1, len(request.block_ids))


def test_one_that_scores_request_by_request_is_told_all() -> None:
    world = World(RecordingSelector)
    requests = {"a": world.start("a", 2, prompt_len=93, want=4), "b": world.start("b", 0, prompt_len=60, want=4)}
    world.choose(*map(world.asked, requests.values()), requests=requests, window=3)
    world.grow(requests["b"], 6)
    world.choose(world.asked(requests["b"]), requests=requests)
    first, second, later = RecordingSelector.asked
    for request, prompt_len, asked in zip(requests.values(), (93, 60), (first, second), strict=True):
        assert (asked.req_id, asked.step_index, asked.prompt_len) == (request.name, 0, prompt_len)
        newest = [world.query(request, prompt_len - 1 - age) for age in range(3)]
        assert asked.queries is not None
        assert asked.earlier is not None
        assert asked.resident is None
        assert torch.equal(torch.stack((asked.queries, *asked.earlier)), torch.stack(newest))
        assert asked.block_ids.tolist() == request.ids[: prompt_len // BLOCK]
    assert (later.req_id, later.step_index, later.earlier) == ("b", 1, None)
    assert later.queries is not None
    assert torch.equal(later.queries, world.query(requests["b"], 65))
    # Without scores all are equal, and the newest stay
    assert later.resident is not None
    assert torch.nonzero(later.resident[0])[:, 0].tolist() == [0, 3, 4, 5, 6, 7]


def test_a_device_fault_and_a_broken_law_are_passed_on() -> None:
    at_once = type("Broken", (FailingSelector,), {"score": lambda *_: (_ for _ in ()).throw(IntegrityError("law"))})
    world = World(at_once)
    requests = {"a": world.start("a", 2, prompt_len=93, want=4)}
    with pytest.raises(IntegrityError, match="law"):
        world.choose(world.asked(requests["a"]), requests=requests)


class ForgetfulSelector(ExactSelector):
    """Cannot make keys any more."""

    is_broken = False

    def add_blocks(self, block_ids: torch.Tensor, keys: object, slots: object = None) -> None:
        if self.is_broken:
            raise MemoryError(f"{len(block_ids)}")
        super().add_blocks(block_ids, keys, slots)  # type: ignore[arg-type]


def test_a_row_with_blocks_without_keys_is_not_scored() -> None:
    world = World(ForgetfulSelector)
    requests = {"a": world.start("a", 2, prompt_len=93, want=4), "b": world.start("b", 0, prompt_len=93, want=4)}
    world.choose(*map(world.asked, requests.values()), requests=requests)
    before = {name: one.chosen for name, one in requests.items()}
    assert isinstance(world.selector, ForgetfulSelector)
    ids = np.array(requests["a"].ids[11:12], np.int32)
    world.selector.is_broken = True
    world.queue.guard.add_blocks(ids, torch.from_numpy(ids).long(), [])
    world.selector.is_broken = False
    for num_tokens, num_failed in ((1, 0), (3, 1)):
        for request in requests.values():
            world.grow(request, num_tokens)
        world.choose(*(world.asked(one, at_once=True) for one in requests.values()), requests=requests)
        assert world.queue.failures["not_indexed"] == num_failed
    assert requests["b"].chosen != before["b"]
    # As nothing new is known of its blocks, it asks for the same ones
    held = requests["a"].chosen
    world.grow(requests["a"], 3)
    world.choose(world.asked(requests["a"]), requests=requests)
    assert requests["a"].chosen == held
    world.queue.guard.add_blocks(ids, torch.from_numpy(ids).long(), list(torch.zeros(A, 1, HKV, BLOCK, D)))
    assert not world.queue.guard.lacks_keys(ids)


def test_lists_come_in_two_parts_and_can_be_forgotten() -> None:
    world = World(ExactSelector)
    requests = {"a": world.start("a", 2, prompt_len=93, want=4), "b": world.start("b", 0, prompt_len=93, want=4)}
    a, b = requests.values()
    world.choose(world.asked(b), requests=requests)
    world.queue.choose(5, world.together(world.asked(a), world.asked(b)))
    assert world.queue.take(5) == []
    (first,) = world.queue.take(6)
    assert ([one.req_id for one in first.asked], first.at_once, first.is_selected.tolist()) == (["a"], True, [True])
    assert world.queue.take(6) == []
    (later,) = world.queue.take(7)
    assert ([one.req_id for one in later.asked], later.at_once) == (["b"], False)
    assert later.seconds >= first.seconds > 0
    world.queue.choose(8, world.together())
    world.queue.choose(9, world.together(world.asked(a, scored=False)))
    (both,) = world.queue.take(11)
    assert both.is_selected.tolist() == [False]
    world.queue.choose(12, world.together(world.asked(a)))
    world.queue.reset()
    assert world.queue.take(14) == []


def test_sets_that_differ_from_those_of_the_device_are_found() -> None:
    world = World(ExactSelector)
    requests = {"a": world.start("a", 2, prompt_len=93, want=4)}
    (a,) = requests.values()
    world.choose(world.asked(a), requests=requests)
    held = np.array(sorted(a.sets[0]), np.int32)
    world.queue.check_sets(2, 102, [held])
    with pytest.raises(IntegrityError, match="place 2 group 0"):
        world.queue.check_sets(2, 102, [held[:-1]])
    world.grow(a, 8)
    world.queue.choose(20, world.together(world.asked(a)))
    # What is on its way counts
    world.queue.check_sets(2, 102, [np.append(held, np.int32(a.end - 1))])
