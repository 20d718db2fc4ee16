"""Batches: labels follow the window, of the rest a sample is drawn, all follows from seed and step."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.indexer.forecast_model import with_neighbours
from flashmemory_vllm.training import batches
from flashmemory_vllm.training.batches import Batch, Sampling, TrainingSteps, later_tokens
from flashmemory_vllm.training.dataset import Document, Schedule, TrainingData
from flashmemory_vllm.training.frame import MAIN_RATIO, frame_of
from tests.unit.training.recordings import Toy, write_recordings

TOY = Toy(documents=6, prompt_blocks=60, tokens=24)
WINDOW, REACH, TOKENS, OPENING = 3, 2, 5, 2
DECAYS = (0.0, 0.9)
SCHEDULE = Schedule(tau=4, delay=1, opening_steps=OPENING)
SAMPLING = Sampling(
    documents=2, tokens=TOKENS, query_window=WINDOW, reach=REACH, schedule=SCHEDULE, decays=DECAYS, seed=5
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    folder: Path = tmp_path_factory.mktemp("data")
    write_recordings(folder, TOY)
    return TrainingData(folder)


def _document_of(batch: Batch, place: int, data: TrainingData) -> Document:
    """The one whose question came."""
    (found,) = [
        document
        for document in map(data.load, range(len(data)))
        if torch.equal(document.question(WINDOW), batch.queries[place, :WINDOW])
    ]
    return found


def test_labels_are_what_heads_pay_while_each_selection_is_in_force(data: TrainingData) -> None:
    batch = TrainingSteps(data, range(6), SAMPLING)[1]
    assert batch.queries.shape == (2, WINDOW + OPENING + TOKENS, 2, 4, 16)
    for place in range(2):
        document = _document_of(batch, place, data)
        # The question's candidates are those of the first recorded token, whose position ends a block
        blocks = document.num_candidates(0) - batch.distance[place, 0].long() // 4
        own = document.keys[:, (blocks * 4).clamp(min=0)].transpose(0, 1)
        is_block = batch.weights[place].amax(0) > 0
        assert torch.equal(batch.pooled[place, is_block, REACH], own[is_block])
        before = document.keys[:, (blocks * 4 - 1).clamp(min=0)].transpose(0, 1)
        assert torch.equal(batch.pooled[place, is_block, REACH - 1], before[is_block])
        assert torch.equal(batch.queries[place, WINDOW : WINDOW + OPENING], document.queries[1 : 1 + OPENING])
        for selection in range(1 + OPENING + TOKENS):
            token = 0
            if selection:
                (token,) = [
                    number
                    for number, query in enumerate(document.queries)
                    if torch.equal(query, batch.queries[place, WINDOW + selection - 1])
                ]
            frame, _ = frame_of(int(document.positions[token]) + 1, 16, MAIN_RATIO)
            free = range(frame.sink_end, min(frame.recent_start, document.num_candidates(token)))
            asked = batch.weights[place, selection] > 0
            assert set(blocks[asked].tolist()) <= set(free)
            shares = torch.from_numpy(document.largest_shares(token, SCHEDULE))
            assert torch.equal(batch.labels[place, selection][asked], shares[blocks[asked]])
            assert set(shares.nonzero().flatten().tolist()) & set(free) <= set(blocks[asked].tolist())
            beside = with_neighbours(document.memory(WINDOW, DECAYS)[token])
            assert torch.equal(batch.memory[place, selection, asked], beside[blocks[asked]])


def test_a_sample_of_the_rest_is_drawn(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MIN_NEGATIVES", 7)
    batch = TrainingSteps(data, range(6), SAMPLING)[0]
    for place in range(2):
        is_block = batch.weights[place].amax(0) > 0
        positives = int((batch.labels[place].amax(0) > 0).sum())
        assert positives > 0
        assert int(is_block.sum()) - positives == max(7, 3 * positives)


def test_an_epoch_sees_each_document_once_in_an_order_of_its_own(data: TrainingData) -> None:
    steps = TrainingSteps(data, range(6), SAMPLING)
    assert steps.steps_per_epoch == 3

    def seen(epoch: int) -> Counter[tuple[float, ...]]:
        parts = [steps[step] for step in range(3 * epoch, 3 * epoch + 3)]
        return Counter(tuple(one[:WINDOW].flatten().tolist()) for part in parts for one in part.queries)

    assert sorted(seen(0).values()) == [1] * 6
    assert seen(0).keys() == seen(1).keys()
    assert list(seen(0)) != list(seen(1))


def test_a_step_is_the_same_however_the_run_got_there(data: TrainingData) -> None:
    first, second = TrainingSteps(data, range(6), SAMPLING), TrainingSteps(data, range(6), SAMPLING)
    _ = first[0], first[5]
    for mine, other in zip(first[3], second[3], strict=True):
        assert torch.equal(mine, other)


def test_processes_see_different_documents(data: TrainingData) -> None:
    parts = [TrainingSteps(data, range(6), replace(SAMPLING, rank=rank, world_size=2))[0] for rank in range(2)]
    rows = [{tuple(one[:WINDOW].flatten().tolist()) for one in part.queries} for part in parts]
    assert not rows[0] & rows[1]


def test_tokens_without_a_future_are_not_used(data: TrainingData) -> None:
    document = data.load(0)
    assert later_tokens(document, Schedule(tau=4, delay=1)).tolist() == list(range(1, TOY.tokens - 2))
    batch = TrainingSteps(data, range(6), replace(SAMPLING, schedule=Schedule(4, TOY.tokens)))[0]
    assert float(batch.weights[:, 1:].sum()) == 0
    assert float(batch.weights[:, 0].sum()) > 0


def test_too_little_data_is_told(data: TrainingData) -> None:
    with pytest.raises(
        ConfigError, match="--batch: a step takes 2 documents and --data has 1 to train on; allowed is at most that"
    ):
        TrainingSteps(data, [0], SAMPLING)
