"""Selectors against brute force, and what each of them promises: bounds bound, needles win, masses add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.indexer import SELECTOR_NAMES, IndexGeometry, Selector, create_selector
from flashmemory_vllm.indexer.exact import ExactSelector
from tests.helpers.alone import Alone, OneByOne

N, BS, HQ, HKV, D, A = 40, 4, 6, 2, 20, 3
SCALE = 0.25
# Dot products of 20 terms and a softmax over 23 blocks in float32.
TOL: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}
INDEXED = ("mean", "bounds", "exact", "h2o")


def make_geometry(layer_groups: tuple[int, ...] = (0, 0, 0), dtype: torch.dtype = torch.float32) -> IndexGeometry:
    return IndexGeometry(
        num_logical_blocks=N,
        block_size=BS,
        num_query_heads=HQ,
        num_kv_heads=HKV,
        head_dim=D,
        softmax_scale=SCALE,
        anchor_layers=(1, 4, 6),
        layer_groups=layer_groups,
        num_groups=max(layer_groups) + 1,
        dtype=dtype,
        device=torch.device("cpu"),
    )


class History:
    """Random keys of 23 blocks under shuffled ids, and random queries."""

    def __init__(self, seed: int = 0, num_blocks: int = 23) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randperm(N, generator=generator)[:num_blocks]
        self.keys = torch.randn(A, num_blocks, HKV, BS, D, generator=generator)
        self.queries = torch.randn(A, HQ, D, generator=generator) * 2

    def add_to(self, selector: Selector) -> None:
        """In two portions: gathered keys, then device pages with tokens outside of heads, NaN in other slots."""
        half, num_slots = len(self.ids) // 2, 30
        selector.add_blocks(self.ids[:half], list(self.keys[:, :half]))
        pages = torch.full((A, num_slots, BS, HKV, 2 * D), torch.nan).transpose(2, 3)[..., :D]
        slots = [torch.randperm(num_slots)[: len(self.ids) - half] for _ in range(A)]
        for layer_pages, layer_slots, keys in zip(pages, slots, self.keys, strict=True):
            layer_pages[layer_slots] = keys[half:]
        selector.add_blocks(self.ids[half:], list(pages), slots)

    def request(self, step_index: int = 0, resident: torch.Tensor | None = None) -> Alone:
        return Alone("r", self.ids, self.queries, step_index, resident)


def head_logits(history: History, anchor: int, head: int) -> torch.Tensor:
    """Scaled logits of every token, [n, BS]."""
    return history.keys[anchor, :, head // (HQ // HKV)] @ history.queries[anchor, head] * SCALE


def brute_force(name: str, history: History, anchor: int, head: int) -> torch.Tensor:
    """Softmax share of each block for one head, written from the definition, [n]."""
    keys = history.keys[anchor, :, head // (HQ // HKV)]  # [n, BS, D]
    query = history.queries[anchor, head]
    if name in ("exact", "h2o"):
        return head_logits(history, anchor, head).flatten().softmax(0).view(-1, BS).sum(1)
    if name == "mean":
        return (keys.mean(1) @ query * SCALE).softmax(0)
    bound = torch.maximum(query * keys.amin(1), query * keys.amax(1)).sum(1)
    return (bound * SCALE).softmax(0)


@pytest.mark.parametrize("layer_groups", [(0, 0, 0), (1, 0, 1)])
@pytest.mark.parametrize("aggregate", ["max", "mean"])
@pytest.mark.parametrize("name", INDEXED)
def test_score_is_the_aggregated_share(name: str, aggregate: str, layer_groups: tuple[int, ...]) -> None:
    history = History()
    selector = create_selector(name, make_geometry(layer_groups), aggregate=aggregate)
    history.add_to(selector)
    rows = []
    for group in range(max(layer_groups) + 1):
        anchors = [anchor for anchor in range(A) if layer_groups[anchor] == group]
        shares = torch.stack([brute_force(name, history, a, head) for a in anchors for head in range(HQ)])
        rows.append(shares.amax(0) if aggregate == "max" else shares.mean(0))
    score = OneByOne(selector).score(history.request())
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, torch.stack(rows), **TOL)


@pytest.mark.parametrize("name", ["exact", "bounds", "h2o"])
def test_planted_needle_is_ranked_first(name: str) -> None:
    """One token in one layer answers one head; the other heads are diffuse."""
    history = History(seed=1)
    needle = 7
    direction = history.queries[2, 4]
    history.keys[2, needle, 4 // (HQ // HKV), 3] = direction / direction.norm() * 40
    selector = create_selector(name, make_geometry())
    history.add_to(selector)
    assert int(OneByOne(selector).score(history.request())[0].argmax()) == needle


@given(
    seed=st.integers(0, 2**31),
    spread=st.floats(0.1, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=40)
def test_bounds_are_an_upper_bound_of_every_token(seed: int, spread: float, dtype: torch.dtype) -> None:
    history = History(seed, num_blocks=5)
    history.keys = (history.keys * spread).to(dtype).float()
    selector = create_selector("bounds", make_geometry(dtype=dtype))
    history.add_to(selector)
    for anchor in range(A):
        rows = selector.index[anchor, history.ids].float()  # type: ignore[attr-defined]
        for head in range(HQ):
            kv_head, query = head // (HQ // HKV), history.queries[anchor, head]
            least, largest = rows[:, kv_head, 0].chunk(2, dim=1)
            bound = torch.maximum(query * least, query * largest).sum(1) * SCALE
            logits = head_logits(history, anchor, head)
            slack = 1e-5 * (1 + logits.abs().max())  # the two sums run in different orders
            assert bool((logits.amax(1) <= bound + slack).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", INDEXED)
def test_bytes_per_block_is_what_the_index_takes(name: str, dtype: torch.dtype) -> None:
    selector = create_selector(name, make_geometry(dtype=dtype))
    index = selector.index  # type: ignore[attr-defined]
    assert selector.bytes_per_block() * N == index.untyped_storage().nbytes()
    per_key_head = {"mean": D, "bounds": 2 * D, "exact": BS * D, "h2o": BS * D}[name]
    assert selector.bytes_per_block() == A * HKV * per_key_head * dtype.itemsize


@pytest.mark.parametrize("name", ["exact", "h2o"])
def test_keys_in_fp8_rank_as_keys_do_for_half_of_the_bytes(name: str) -> None:
    history = History()
    history.keys[:, 3] *= 1e-3
    scores = []
    for index_dtype in ("auto", "fp8"):
        selector = create_selector(name, make_geometry(dtype=torch.bfloat16), index_dtype=index_dtype)
        history.add_to(selector)
        scores.append(OneByOne(selector).score(history.request()))
    assert isinstance(selector, ExactSelector)
    assert selector.scales is not None
    parts = (selector.index, selector.scales)
    assert selector.bytes_per_block() * N == sum(part.untyped_storage().nbytes() for part in parts)
    assert selector.bytes_per_block() == A * HKV * (BS * D + 4)
    # Three bits behind the point, of logits of a few units
    torch.testing.assert_close(scores[1], scores[0], rtol=0.3, atol=1e-3)
    assert set(scores[1][0].topk(6).indices.tolist()) == set(scores[0][0].topk(6).indices.tolist())
    # Blocks with small keys have scales of their own
    small = history.ids[3]
    restored = selector.index[:, small].float() * selector.scales[:, small, :, None, None]
    torch.testing.assert_close(restored, history.keys[:, 3], rtol=0.1, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(SELECTOR_NAMES) - {"neural"}))  # that one needs a checkpoint
def test_scores_repeat_and_ignore_index_rows_of_other_blocks(name: str) -> None:
    history = History()
    scores = []
    for poison in (0.0, torch.nan):
        selector = create_selector(name, make_geometry((0, 1, 1)))
        if selector.needs_keys:
            selector.index.fill_(poison)  # type: ignore[attr-defined]
        history.add_to(selector)
        scores.append(OneByOne(selector).score(history.request()))
    assert scores[0].shape == (2, len(history.ids))
    assert torch.equal(scores[0], scores[1])


def test_positional_selectors_take_no_device_memory_and_no_queries() -> None:
    for name in set(SELECTOR_NAMES) - {*INDEXED, "neural"}:
        selector = create_selector(name, make_geometry())
        assert (selector.needs_queries, selector.needs_keys) == (False, False)
        assert selector.bytes_per_block() == 0
        assert OneByOne(selector).score(Alone("r", torch.arange(5), None, 0)).isfinite().all()


def test_streaming_prefers_the_newest_and_full_prefers_none() -> None:
    request = Alone("r", torch.tensor([9, 3, 5]), None, 0)
    assert OneByOne(create_selector("streaming", make_geometry())).score(request).argsort().tolist() == [[0, 1, 2]]
    assert OneByOne(create_selector("full", make_geometry())).score(request).any().item() is False


def test_random_draws_differ_by_step_seed_and_group_but_not_by_request() -> None:
    selector = create_selector("random", make_geometry((0, 1, 1)))

    def draw(step: int, req_id: str = "r", chosen: Selector = selector) -> torch.Tensor:
        return OneByOne(chosen).score(Alone(req_id, torch.arange(30), None, step))

    first = draw(0)
    assert torch.equal(first, draw(0, "other"))
    assert not torch.equal(first, draw(1))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, draw(0, chosen=create_selector("random", make_geometry((0, 1, 1)), seed=1)))


def test_random_draws_are_uniform() -> None:
    selector = create_selector("random", make_geometry())
    drawn = OneByOne(selector).score(Alone("r", torch.arange(4096), None, 3))[0]
    assert drawn.min() >= 0
    assert drawn.max() < 1
    # 8 bins of 512: a standard deviation is 21, and the draws are fixed.
    assert (torch.histc(drawn, 8, 0, 1) - 512).abs().max() < 100


@pytest.mark.parametrize("name", ["mean", "bounds", "exact", "h2o"])
def test_a_block_is_worth_what_it_is_worth_to_any_of_several_tokens(name: str) -> None:
    history = History()
    selector = create_selector(name, make_geometry())
    history.add_to(selector)
    earlier = torch.randn(2, A, HQ, D) * 2
    alone = [OneByOne(selector).score(Alone("r", history.ids, one, 0)) for one in (history.queries, *earlier)]
    together = OneByOne(selector).score(Alone("r", history.ids, history.queries, 0, earlier=earlier))
    assert torch.equal(together, torch.stack(alone).amax(0))


def test_heavy_hitter_gains_in_the_resident_set_only() -> None:
    history = History()
    selector = create_selector("h2o", make_geometry())
    history.add_to(selector)
    one = OneByOne(selector)
    first = one.score(history.request())
    resident = torch.zeros(1, len(history.ids), dtype=torch.bool)
    resident[0, :9] = True
    second = one.score(history.request(step_index=1, resident=resident))
    assert torch.equal(second[:, 9:], first[:, 9:])

    inside = History()
    inside.ids, inside.keys = history.ids[:9], history.keys[:, :9]
    exact = create_selector("exact", make_geometry())
    inside.add_to(exact)
    torch.testing.assert_close(second[:, :9] - first[:, :9], OneByOne(exact).score(inside.request()), **TOL)


def test_heavy_hitter_takes_new_blocks_and_an_empty_resident_set() -> None:
    """Blocks that the memory does not know are newer than the set: they alone gain then."""
    history = History()
    selector = create_selector("h2o", make_geometry())
    history.add_to(selector)
    one = OneByOne(selector)
    first = one.score(Alone("r", history.ids[:20], history.queries))
    nothing = torch.zeros(1, len(history.ids), dtype=torch.bool)
    grown = one.score(history.request(step_index=1, resident=nothing))
    assert torch.equal(grown[:, :20], first)
    inside = History()
    inside.ids, inside.keys = history.ids[20:], history.keys[:, 20:]
    exact = create_selector("exact", make_geometry())
    inside.add_to(exact)
    torch.testing.assert_close(grown[:, 20:], OneByOne(exact).score(inside.request()), **TOL)


def test_heavy_hitter_goes_on_with_its_mass_after_a_preemption() -> None:
    history = History()
    selector = create_selector("h2o", make_geometry())
    history.add_to(selector)
    one = OneByOne(selector)
    first = one.score(history.request())
    # Without a set, with a block less, and with a question that the mass has in it already
    again = Alone("r", history.ids[:-1], history.queries, 1, earlier=torch.randn(2, A, HQ, D))
    exact = create_selector("exact", make_geometry())
    history.add_to(exact)
    alone = OneByOne(exact).score(Alone("r", history.ids[:-1], history.queries))
    torch.testing.assert_close(one.score(again), first[:, :-1] + alone, **TOL)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"selector must be one of full, .*; got 'best'"):
        create_selector("best", make_geometry())
    with pytest.raises(
        ConfigError, match=r"takes the options \['aggregate', 'memory_decay', 'question_share'\]; got \['seed'\]"
    ):
        create_selector("mean", make_geometry(), seed=1)
    with pytest.raises(ConfigError, match=r"aggregate must be one of max, mean; got 'sum'"):
        create_selector("mean", make_geometry(), aggregate="sum")
    with pytest.raises(ConfigError, match=r"groups \[0\] have none"):
        create_selector("exact", make_geometry((1, 1, 1)))
    with pytest.raises(ConfigError, match=r"layer_groups must lie in 0..1; got \(0, -1, 1\)"):
        make_geometry((0, -1, 1))
