"""Selector `neural`: what serving scores is what was trained, from pages or gathered keys, and misfits are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flashmemory_kernels.common import aggregated
from flashmemory_kernels.score_chunks import dequantise_codes

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.indexer import IndexGeometry, create_selector, neural
from flashmemory_vllm.indexer.checkpoint import round_weights, save_indexer
from flashmemory_vllm.indexer.due import DueRequest, due_rows
from flashmemory_vllm.indexer.neural import NeuralSelector
from flashmemory_vllm.indexer.neural_model import IndexerSpec, NeuralIndexer, pooled_keys
from flashmemory_vllm.indexer.places import PlaceState
from tests.helpers.alone import Alone, OneByOne

SPEC = IndexerSpec(
    model="toy",
    num_layers=6,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=16,
    block_size=8,
    chunk_size=4,
    reach=1,
    query_window=3,
    opening_steps=1,
    anchor_layers=(1, 3, 4),
    rank=12,
    num_heads=3,
    dim=20,
    aggregate="max",
    threshold=0.5,
    tau=64,
    delay=1,
    data="0" * 64,
)
N, NUM_BLOCKS, NUM_SLOTS = 30, 23, 25


def make_model(spec: IndexerSpec = SPEC) -> NeuralIndexer:
    """Drawn weights, as they are stored, with every part of the formula at work."""
    generator = torch.Generator().manual_seed(0)
    model = NeuralIndexer(spec)
    model.init_weights(generator)
    for weight in (model.gate, model.bias, model.distance):
        torch.nn.init.normal_(weight, generator=generator)
    torch.nn.init.uniform_(model.reach_offset, -1, 0, generator=generator)
    model.standardise(torch.randn(9, 3, 4, 16, generator=generator), torch.randn(9, 3, 2, 3, 16, generator=generator))
    model.calibrate(0.7, -0.3)
    round_weights(model)
    return model.eval()


def make_geometry(spec: IndexerSpec = SPEC, layer_groups: tuple[int, ...] = (0, 0, 0)) -> IndexGeometry:
    return IndexGeometry(
        num_logical_blocks=N,
        block_size=spec.block_size,
        num_query_heads=spec.num_query_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        softmax_scale=0.25,
        anchor_layers=spec.anchor_layers,
        layer_groups=layer_groups,
        num_groups=max(layer_groups) + 1,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


class History:
    """Random keys of some blocks under shuffled ids, and random queries."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randperm(N, generator=generator)[:NUM_BLOCKS]
        self.keys = torch.randn(3, NUM_BLOCKS, 2, 8, 16, generator=generator)
        self.queries = torch.randn(3, 4, 16, generator=generator)

    @property
    def pooled(self) -> torch.Tensor:
        """Of all chunks, [n * C, A, Hkv, 3, D]."""
        return torch.stack([pooled_keys(keys, SPEC.chunk_size) for keys in self.keys], dim=1)

    def expected(self, model: NeuralIndexer) -> torch.Tensor:
        """Logits of the module, [A, n]."""
        per_block, reach = model.spec.chunks_per_block, model.spec.reach
        rows = torch.arange(NUM_BLOCKS).unsqueeze(1) * per_block + torch.arange(-reach, per_block)
        distance = (NUM_BLOCKS - torch.arange(NUM_BLOCKS).float()) * per_block
        with torch.no_grad():
            pooled = self.pooled[rows.clamp(min=0)].unsqueeze(0)
            logits: torch.Tensor = model(self.queries[None, None], pooled, distance[None, None])[0, 0]
        return logits


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    path = tmp_path / "indexer.safetensors"
    save_indexer(make_model(), path)
    return str(path)


@pytest.mark.parametrize("layer_groups", [(0, 0, 0), (1, 0, 1)])
@pytest.mark.parametrize("aggregate", ["max", "mean"])
def test_score_is_the_modules_probability(tmp_path: Path, aggregate: str, layer_groups: tuple[int, ...]) -> None:
    model = make_model(replace(SPEC, aggregate=aggregate))  # type: ignore[arg-type]
    save_indexer(model, tmp_path / "indexer.safetensors")
    selector = create_selector("neural", make_geometry(layer_groups=layer_groups), indexer=str(tmp_path))
    history = History()
    selector.add_blocks(history.ids, list(history.keys))
    logits = history.expected(model)
    rows = [
        aggregated(logits[[own == group for own in layer_groups]], model.spec.aggregate, 0)
        for group in range(max(layer_groups) + 1)
    ]
    score = OneByOne(selector).score(Alone("r", history.ids, history.queries, 0))
    assert score.dtype == torch.float32
    # fp8 codes may round the other way where two sums differ in their last bit.
    # What stands in for the chunks before the first block in training is no matter: that is never a sample
    expected = model.probability(torch.stack(rows))
    torch.testing.assert_close(score[:, 1:], expected[:, 1:], rtol=2e-3, atol=2e-4)


def test_a_block_is_worth_what_it_is_worth_to_any_of_several_tokens(checkpoint: str) -> None:
    history = History()
    selector = NeuralSelector(make_geometry(), checkpoint)
    selector.add_blocks(history.ids, list(history.keys))
    earlier = torch.randn(2, *history.queries.shape)
    alone = [OneByOne(selector).score(Alone("r", history.ids, one, 0)) for one in (history.queries, *earlier)]
    together = OneByOne(selector).score(Alone("r", history.ids, history.queries, 0, earlier=earlier))
    assert torch.equal(together, torch.stack(alone).amax(0))


def test_what_the_question_asked_for_keeps_its_score(checkpoint: str) -> None:
    history = History()
    selector = NeuralSelector(make_geometry(), checkpoint)
    selector.add_blocks(history.ids, list(history.keys))
    one, resident = OneByOne(selector), torch.ones(1, len(history.ids), dtype=torch.bool)
    other = torch.randn(history.queries.shape, generator=torch.Generator().manual_seed(7))
    first = one.score(Alone("r", history.ids[:-3], history.queries, 0))
    alone = one.score(Alone("another", history.ids, other, 0))
    later = one.score(Alone("r", history.ids, other, 1, resident))
    assert torch.equal(later[:, :-3], torch.maximum(first, alone[:, :-3]))
    assert torch.equal(later[:, -3:], alone[:, -3:])
    # A third selection forgets the second's tokens, not the question
    third = one.score(Alone("r", history.ids, -other, 2, resident))
    assert bool((third[:, :-3] >= first).all())
    assert not bool((third[:, :-3] >= later[:, :-3]).all())


def test_a_request_may_come_back_with_a_block_less(checkpoint: str) -> None:
    history = History()
    selector = NeuralSelector(make_geometry(), checkpoint)
    selector.add_blocks(history.ids, list(history.keys))
    one = OneByOne(selector)
    first = one.score(Alone("r", history.ids, history.queries, 0))
    again = one.score(Alone("r", history.ids[:-1], -history.queries, 1))
    assert again.shape == (1, len(history.ids) - 1)
    assert bool((again >= first[:, :-1]).all())


def test_the_blocks_that_the_question_lies_in_are_kept(checkpoint: str) -> None:
    selector = create_selector("neural", make_geometry(), indexer=checkpoint)
    history = History()
    selector.add_blocks(history.ids, list(history.keys))
    one = OneByOne(selector)

    def kept(num_blocks: int, step: int, prompt_len: int) -> list[int]:
        request = Alone("r", history.ids[:num_blocks], history.queries, step, prompt_len=prompt_len)
        return torch.nonzero(one.score(request)[0] == 1).flatten().tolist()

    # Three tokens of blocks of eight: the last of block 9, and two of block 10, which is not full yet
    assert kept(10, 0, prompt_len=82) == [9]
    assert kept(12, 1, prompt_len=82) == [9, 10]
    # Nobody told
    assert kept(12, 0, prompt_len=0) == []


@pytest.mark.parametrize("most_tokens", [1, 5])
def test_rows_in_any_portions_give_the_same(checkpoint: str, most_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of different lengths and numbers of queries, in one portion and in several."""
    history, generator = History(), torch.Generator().manual_seed(3)
    selector = NeuralSelector(make_geometry(), checkpoint)
    selector.add_blocks(history.ids, list(history.keys))
    queries, ids = torch.randn(3, 4, 5, 4, 16, generator=generator), history.ids.int().repeat(4, 1)
    rows = [DueRequest(2, 7, 11, 3), DueRequest(0, 23, 4, 1, prompt_len=70), DueRequest(3, 12, 6, 2)]
    memories = []
    for size in (10**6, most_tokens):
        monkeypatch.setattr(neural, "MOST_TOKENS", size)
        memory = torch.full((2, 1, 4, NUM_BLOCKS), torch.nan)
        state = PlaceState(queries, ids, memory, torch.zeros(1, 4, NUM_BLOCKS, dtype=torch.int8))
        selector.remember(due_rows(rows, torch.device("cpu"), is_entering=True), state)
        memories.append(memory)
    for request in rows:
        alone, other = (memory[:, :, request.place, : request.num_blocks] for memory in memories)
        assert alone.isfinite().all()
        torch.testing.assert_close(alone, other)
    assert memories[0][:, :, 1].isnan().all()


def test_a_query_that_is_no_number_asks_for_nothing(checkpoint: str) -> None:
    history = History()
    selector = NeuralSelector(make_geometry(), checkpoint)
    selector.add_blocks(history.ids, list(history.keys))
    queries = history.queries.clone()
    queries[:, 0, 0] = torch.nan
    assert not OneByOne(selector).score(Alone("r", history.ids, queries)).any()


def test_pooled_keys_are_bounds_and_mean_of_each_chunk() -> None:
    keys = torch.randn(3, 2, 16, 4)
    pooled = pooled_keys(keys, 8)
    assert (pooled.dtype, pooled.shape) == (torch.float32, (6, 2, 3, 4))
    chunk = keys[1, 0, 8:]
    torch.testing.assert_close(pooled[3, 0], torch.stack((chunk.amax(0), chunk.amin(0), chunk.mean(0))))


def test_pages_give_the_codes_of_gathered_keys(checkpoint: str) -> None:
    history = History()
    gathered, paged = (NeuralSelector(make_geometry(), checkpoint) for _ in range(2))
    gathered.add_blocks(history.ids, list(history.keys))
    pages = torch.full((3, NUM_SLOTS, 8, 2, 32), torch.nan).transpose(2, 3)[..., :16]
    slots = [torch.randperm(NUM_SLOTS)[:NUM_BLOCKS] for _ in range(3)]
    for layer_pages, layer_slots, keys in zip(pages, slots, history.keys, strict=True):
        layer_pages[layer_slots] = keys
    half = NUM_BLOCKS // 2
    for part in (slice(half), slice(half, None)):
        paged.add_blocks(history.ids[part], list(pages), [layer_slots[part] for layer_slots in slots])
    request = Alone("r", history.ids, history.queries, 0)
    torch.testing.assert_close(OneByOne(paged).score(request), OneByOne(gathered).score(request), rtol=1e-3, atol=1e-4)


def test_stored_codes_are_the_rounded_ones(checkpoint: str) -> None:
    selector, history = NeuralSelector(make_geometry(), checkpoint), History()
    selector.add_blocks(history.ids, list(history.keys))
    per_block = dequantise_codes(selector.codes, selector.scales)
    stored = per_block[:, history.ids].flatten(1, 2)
    with torch.no_grad():
        codes = make_model().encode_keys(history.pooled).transpose(0, 1)
    # Three bits of mantissa; the smallest numbers of a row have fewer.
    torch.testing.assert_close(stored, codes, rtol=2**-4, atol=float(codes.abs().max()) / 448 * 2**-9)


def test_bytes_per_block_are_known_before_anything_is_allocated(checkpoint: str) -> None:
    selector = NeuralSelector(make_geometry(), checkpoint)
    allocated = selector.codes.untyped_storage().nbytes() + selector.scales.untyped_storage().nbytes()
    assert selector.bytes_per_block() * N == allocated == 3 * 2 * (20 + 4) * N
    meta = NeuralSelector(replace(make_geometry(), device=torch.device("meta")), checkpoint)
    assert meta.bytes_per_block() == selector.bytes_per_block()
    assert meta.codes.is_meta
    assert meta.score_threshold == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_query_heads": 8}, r"num_query_heads 4 \(served: 8\)"),
        ({"num_kv_heads": 4}, r"num_kv_heads 2 \(served: 4\)"),
        ({"head_dim": 64}, r"head_dim 16 \(served: 64\)"),
        ({"anchor_layers": (1, 3, 5)}, r"anchor_layers \[1, 3, 4\] \(served: \[1, 3, 5\]\)"),
        ({"num_kv_heads": 4, "head_dim": 64}, r"num_kv_heads 2 \(served: 4\), head_dim 16 \(served: 64\)"),
    ],
)
def test_another_model_is_refused(checkpoint: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"was trained for 'toy' with .*" + message):
        NeuralSelector(make_geometry(replace(SPEC, **change)), checkpoint)


@pytest.mark.parametrize("block_size", [4, 16])
def test_blocks_of_another_size_have_the_same_chunks(checkpoint: str, block_size: int) -> None:
    """A block is worth what its best chunk is worth, or one that speaks for it, however blocks are cut."""
    history = History()
    num_chunks = NUM_BLOCKS * 2 // (block_size // 4) * (block_size // 4)
    keys = history.keys.transpose(1, 2).flatten(2, 3)[:, :, : num_chunks * 4]
    keys = keys.reshape(3, 2, -1, block_size, 16).transpose(1, 2)
    ids = torch.randperm(N, generator=torch.Generator().manual_seed(2))[: keys.shape[1]]
    if block_size == 4:
        ids = torch.arange(keys.shape[1]).flip(0)
    geometry = replace(make_geometry(), block_size=block_size, num_logical_blocks=NUM_BLOCKS * 2)
    selector = NeuralSelector(geometry, checkpoint)
    selector.add_blocks(ids, list(keys))
    score = OneByOne(selector).score(Alone("r", ids, history.queries, 0))[0]
    # By the module: chunks that are blocks of their own, and no reach
    model = make_model()
    of_chunks = replace(model.spec.at(4), reach=0)
    alone = NeuralIndexer(of_chunks)
    alone.load_state_dict(model.state_dict() | {"reach_offset": torch.zeros(3, 0)})
    distance = num_chunks - torch.arange(num_chunks).float()
    with torch.no_grad():
        pooled = history.pooled[:num_chunks, None].unsqueeze(0)
        chunks = alone(history.queries[None, None], pooled, distance[None, None])[0, 0]
        per_block = block_size // 4
        best = chunks.view(3, -1, per_block).amax(2)
        before = chunks[:, per_block - 1 : -1 : per_block] + model.reach_offset
        best[:, 1:] = torch.maximum(best[:, 1:], before)
        expected = model.probability(best.amax(0))
    torch.testing.assert_close(score, expected, rtol=2e-3, atol=2e-4)
    assert selector.bytes_per_block() == 3 * per_block * (20 + 4)


@pytest.mark.parametrize(
    ("reach", "block_size", "allowed"),
    [(1, 10, r"multiples of 4$"), (2, 4, r"multiples of 4 from 8 on$"), (0, 6, r"multiples of 4$")],
)
def test_blocks_that_are_no_whole_chunks_are_refused(tmp_path: Path, reach: int, block_size: int, allowed: str) -> None:
    save_indexer(make_model(replace(SPEC, reach=reach)), tmp_path / "indexer.safetensors")
    with pytest.raises(ConfigError, match=f"chunks of 4 tokens, --block-size is {block_size}: allowed are {allowed}"):
        NeuralSelector(replace(make_geometry(), block_size=block_size), str(tmp_path))


def test_what_is_missing_is_told(checkpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"layer groups \[1\] have none of them"):
        NeuralSelector(make_geometry(layer_groups=(0, 0, 2)), checkpoint)
    with pytest.raises(ConfigError, match="'neural' needs the option indexer"):
        create_selector("neural", make_geometry())


def test_an_indexer_implies_the_selector() -> None:
    def read(**options: object) -> FlashMemoryConfig:
        return FlashMemoryConfig.from_additional_config({"flashmemory": options})

    assert read(indexer="x.safetensors").selector == "neural"
    assert read(indexer="x.safetensors", selector="neural").indexer == "x.safetensors"
    with pytest.raises(ConfigError, match=r"flashmemory\.selector is 'bounds' and flashmemory\.indexer is 'x'"):
        read(indexer="x", selector="bounds")
    with pytest.raises(ConfigError, match=r"'neural' and flashmemory\.indexer is None"):
        read(selector="neural")
    with pytest.raises(ConfigError, match=r"flashmemory\.indexer is 3: allowed is unset or text"):
        read(indexer=3)
