"""A forecast in serving: what is remembered of blocks is what a recording says, and so is what the head makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flashmemory_kernels.choose_sets import ChoicePolicy
from flashmemory_kernels.forecast_blocks import NOT_ASKED

from flashmemory_vllm.capture.document import Document as Captured
from flashmemory_vllm.capture.prompts import Prompt
from flashmemory_vllm.indexer import IndexGeometry
from flashmemory_vllm.indexer.checkpoint import load_indexer, save_indexer
from flashmemory_vllm.indexer.neural import NeuralSelector
from flashmemory_vllm.indexer.neural_model import IndexerSpec, NeuralIndexer, calibrated
from flashmemory_vllm.own_options import IndexDtype
from flashmemory_vllm.residency.asked import Asked, AskedRow
from flashmemory_vllm.runtime.choice import ChoiceSizes, ChoiceState
from flashmemory_vllm.runtime.choices import ChoiceQueue
from flashmemory_vllm.runtime.side_stream import SideStream
from flashmemory_vllm.training.dataset import Document
from flashmemory_vllm.training.evaluation import IndexerScorer
from tests.unit.capture.watched_model import ANCHORS, BS, CHUNK, HKV, HQ, LAYERS, SCALE, D, Model

# The question's first token fills a block. What earlier ones would pay to it serving counts, a recording does not
WINDOW, PROMPT, TOKENS, PLACE, OTHER = 4, 27, 18, 1, 0
DECAYS = (0.0, 0.9, 0.98, 1.0)
C = len(DECAYS)
NUM_BLOCKS = 40
SPEC = IndexerSpec(
    model="toy",
    num_layers=LAYERS,
    num_query_heads=HQ,
    num_kv_heads=HKV,
    head_dim=D,
    block_size=BS,
    chunk_size=CHUNK,
    reach=1,
    query_window=WINDOW,
    opening_steps=0,
    anchor_layers=ANCHORS,
    rank=12,
    num_heads=3,
    dim=16,
    aggregate="max",
    threshold=0.5,
    tau=1,
    delay=1,
    data="0" * 64,
    memory_decays=DECAYS,
    forecast_threshold=0.125,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """An indexer whose head has a say of its own, in every part."""
    model = NeuralIndexer(SPEC)
    model.init_weights(torch.Generator().manual_seed(0))
    assert model.head is not None
    torch.nn.init.normal_(model.head.out, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(model.head.linear, std=0.3, generator=torch.Generator().manual_seed(2))
    model.head.calibration.copy_(torch.tensor([0.7, -0.2]))
    save_indexer(model, tmp_path / "indexer.safetensors")
    return tmp_path / "indexer.safetensors"


class Served:
    """A request that is selected for after every token, through the queue of choices."""

    def __init__(self, checkpoint: Path, model: Model, index_dtype: IndexDtype = "auto", num_kept: int = 2) -> None:
        geometry = IndexGeometry(
            NUM_BLOCKS, BS, HQ, HKV, D, SCALE, ANCHORS, (0, 0), 1, torch.float32, torch.device("cpu")
        )
        self.selector = NeuralSelector(geometry, str(checkpoint), index_dtype=index_dtype)
        kind, width = self.selector.memory_kind, 16
        self.queries = torch.zeros(len(ANCHORS), 2, num_kept, HQ, D)
        self.block_ids = torch.zeros(2, width, dtype=torch.int32)
        self.ids = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(5))[:width].int()
        sizes = ChoiceSizes(len(kind.channels), 1, 2, width, 2, width)
        policy = ChoicePolicy(kind.combine, threshold=self.selector.score_threshold)
        self.state = ChoiceState(sizes, self.queries, self.block_ids, kind, policy)
        # What an earlier tenant left must not matter
        self.state.places.memory.fill_(0.7)
        self.queue = ChoiceQueue(self.selector, self.state, SideStream(torch.device("cpu")))
        self.model, self.place, self.num_full, self.step = model, PLACE, 0, 0

    def of_anchors(self, position: int) -> torch.Tensor:
        return self.model.queries[0][list(ANCHORS), position]

    def select(self, num_tokens: int, *, is_new: bool = False) -> torch.Tensor:
        """Memory [C + 3, n] after a selection with so many tokens."""
        full = num_tokens // BS
        keys = self.model.keys[0][list(ANCHORS), self.num_full * BS : full * BS]
        if full > self.num_full:
            blocks = keys.reshape(len(ANCHORS), -1, BS, HKV, D).transpose(2, 3)
            self.selector.add_blocks(self.ids[self.num_full : full].long(), list(blocks))
            self.num_full = full
        self.block_ids[self.place, : full + 1] = self.ids[: full + 1]
        num_kept = self.queries.shape[2]
        for position in range(max(0, num_tokens - num_kept), num_tokens):
            self.queries[:, self.place, position % num_kept] = self.of_anchors(position)
        end = full + 1
        row = AskedRow(
            "r", self.place, 5 + self.place, num_tokens, PROMPT, full, 1, end - 1, end, 3, 16,
            is_new, True, is_new,
        )  # fmt: skip
        asked = range(PROMPT - WINDOW, min(PROMPT, num_tokens - 1))
        self.step += 1
        question = {"r": torch.stack([self.of_anchors(at) for at in asked])} if is_new else {}
        self.queue.choose(self.step, Asked.of([row], self.block_ids.numpy()), question)
        self.queue.take(self.step + 2)
        assert self.queue.failures == dict.fromkeys(self.queue.failures, 0)
        return self.state.places.memory[:, 0, self.place, :full].clone()


def record(model: Model) -> Document:
    """What `flashmemory capture` writes of the request, as a trainer reads it."""
    for layer in (model.queries, model.keys):
        # So that the float16 of a recording is all of it
        layer[0] = layer[0].half().float()
    model.step([(0, PROMPT, 0, PROMPT)])
    for done in range(PROMPT, PROMPT + TOKENS):
        model.step([(0, PROMPT, done, 1)])
    captured = Captured(Prompt((0,) * PROMPT, TOKENS, 0, None), [0] * TOKENS, model.recorder.take("0"), 1)
    tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in captured.tensors(BS).items()}
    return Document(tensors, BS, CHUNK)


def test_serving_forecasts_what_training_does(checkpoint: Path) -> None:
    model = Model([PROMPT + TOKENS], window=WINDOW)
    document, trained = record(model), load_indexer(checkpoint, torch.device("cpu"))
    scorer, recorded = IndexerScorer(trained, document), document.memory(WINDOW, DECAYS)
    assert trained.head is not None
    served, kept = Served(checkpoint, model), document.question_blocks(WINDOW)
    for token in range(TOKENS):
        num_tokens = PROMPT + token
        memory = served.select(num_tokens, is_new=token == 0)
        num_blocks = memory.shape[1]
        if num_blocks > document.num_candidates(token):
            # The token has filled a block, which serving chooses from at once
            continue
        torch.testing.assert_close(memory[:C, :num_blocks], recorded[token, :, :num_blocks], rtol=2e-3, atol=1e-5)
        expected = calibrated(scorer(token), trained.head.calibration)
        if token == 0:
            # In training too, but for tokens that do not ask for it
            expected[kept] = 1.0
            assert torch.equal(memory[C], memory[C + 1])
        assert bool((memory[C + 1, document.num_candidates(0) :] == NOT_ASKED).all())
        # Codes of keys that a recording has rounded may differ in their last bit
        torch.testing.assert_close(memory[-1], expected, rtol=0.02, atol=0.005)
        assert len(set(memory[-1, : kept.start].tolist())) > 4
    assert served.selector.score_threshold == 0.125


def test_what_was_remembered_comes_back_with_the_request(checkpoint: Path) -> None:
    model = Model([PROMPT + TOKENS], window=WINDOW)
    away, stayed = Served(checkpoint, model), Served(checkpoint, model)
    for served in (away, stayed):
        served.select(PROMPT, is_new=True)
        served.select(PROMPT + 2)
    away.queue.park("r", PLACE, (PROMPT + 2) // BS)
    away.place = OTHER
    # What the question paid is not paid again: only the newest token counts
    found, expected = away.select(PROMPT + 3, is_new=True), stayed.select(PROMPT + 3)
    torch.testing.assert_close(found[: C + 2], expected[: C + 2])


def test_all_tokens_pay_and_the_newest_one_asks_for_content(checkpoint: Path) -> None:
    model = Model([PROMPT + TOKENS], window=WINDOW)
    newest_only, all_tokens = Served(checkpoint, model), Served(checkpoint, model, num_kept=4)
    one, other = (
        [served.select(PROMPT, is_new=True), served.select(PROMPT + 3)] for served in (newest_only, all_tokens)
    )
    assert torch.equal(one[1][C : C + 2], other[1][C : C + 2])
    assert bool((other[1][1:C] >= one[1][1:C] - 1e-6).all())
    assert not torch.allclose(other[1][1:C], one[1][1:C])


def test_keys_in_fp8_take_half_and_say_about_the_same(checkpoint: Path) -> None:
    model = Model([PROMPT + TOKENS], window=WINDOW)
    exact, half = Served(checkpoint, model), Served(checkpoint, model, "fp8")
    of_codes = SPEC.bytes_per_block
    assert exact.selector.bytes_per_block() - of_codes == len(ANCHORS) * HKV * BS * D * 4
    assert half.selector.bytes_per_block() - of_codes == SPEC.key_bytes_per_block == len(ANCHORS) * HKV * (BS * D + 4)
    one, other = (served.select(PROMPT, is_new=True) for served in (exact, half))
    torch.testing.assert_close(other[:C], one[:C], rtol=0.2, atol=0.01)
    assert not torch.equal(other[:C], one[:C])


def test_without_a_head_nothing_is_kept_beside_codes(tmp_path: Path) -> None:
    model = NeuralIndexer(replace(SPEC, memory_decays=()))
    model.init_weights(torch.Generator().manual_seed(0))
    save_indexer(model, tmp_path / "indexer.safetensors")
    served = Served(tmp_path, Model([PROMPT + TOKENS], window=WINDOW))
    assert served.selector.bytes_per_block() == SPEC.bytes_per_block
    assert (len(served.selector.memory_kind.channels), served.selector.score_threshold) == (2, 0.5)
