"""Batches: labels follow the window, negatives are needed by none of its tokens, all follows from seed and step."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.training.batches import DOCUMENTS_PER_STEP, Sampling, TrainingSteps, usable_tokens
from flashmemory_vllm.training.dataset import TrainingData
from tests.unit.training.recordings import Toy, write_recordings

TOY = Toy(documents=6, prompt_blocks=30, tokens=24)
SAMPLING = Sampling(tokens_per_step=16, tau=4, delay=1, seed=5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    folder: Path = tmp_path_factory.mktemp("data")
    write_recordings(folder, TOY)
    return TrainingData(folder)


def test_labels_are_the_union_of_the_window(data: TrainingData) -> None:
    documents = {number: data.load(number) for number in range(4)}
    batch = TrainingSteps(data, list(documents), SAMPLING)[1]
    assert batch.queries.shape == (16, 2, 4, 16)
    for row, query in enumerate(batch.queries):
        (place,) = [
            (document, token)
            for document in documents.values()
            for token in range(len(document))
            if torch.equal(document.queries[token], query)
        ]
        document, token = place
        needed = set(document.golden.union(*document.window(token, 4, 1), document.num_candidates(token)).tolist())
        asked = batch.weights[row] > 0
        blocks = (document.num_candidates(token) - batch.distance[row][asked]).long()
        assert torch.equal(batch.pooled[batch.rows[row][asked]], document.keys[:, blocks].transpose(0, 1))
        labels = {
            block: label == 1 for block, label in zip(blocks.tolist(), batch.labels[row][asked].tolist(), strict=True)
        }
        assert {block for block, label in labels.items() if label} == needed
        assert len(labels) == int(asked.sum())
        assert len(labels) - len(needed) == min(document.num_candidates(token) - len(needed), max(16, 3 * len(needed)))
        # Every token of the toy needs block 0.
        assert [weight for block, weight in zip(blocks, batch.weights[row][asked], strict=True) if block == 0] == [0.5]


def test_an_epoch_sees_each_token_once_in_an_order_of_its_own(data: TrainingData) -> None:
    steps = TrainingSteps(data, range(6), SAMPLING)
    # 22 usable tokens of each of 6 documents, in chunks of at most 4, of which a step takes 4
    assert steps.steps_per_epoch == 9

    def seen(epoch: int) -> Counter[tuple[float, ...]]:
        first = epoch * steps.steps_per_epoch
        batches = [steps[step] for step in range(first, first + steps.steps_per_epoch)]
        return Counter(tuple(query.flatten().tolist()) for batch in batches for query in batch.queries)

    assert set(seen(0).values()) == {1}
    assert list(seen(0)) != list(seen(1))


def test_a_step_is_the_same_however_the_run_got_there(data: TrainingData) -> None:
    first, second = TrainingSteps(data, range(6), SAMPLING), TrainingSteps(data, range(6), SAMPLING)
    _ = first[0], first[8]
    for mine, other in zip(first[3], second[3], strict=True):
        assert torch.equal(mine, other)


def test_processes_see_different_tokens(data: TrainingData) -> None:
    parts = [
        TrainingSteps(data, range(6), Sampling(8, tau=4, delay=1, seed=5, rank=rank, world_size=2))[0]
        for rank in range(2)
    ]
    rows = [{tuple(query.flatten().tolist()) for query in part.queries} for part in parts]
    assert not rows[0] & rows[1]


def test_tokens_without_a_future_are_not_used(data: TrainingData) -> None:
    document = data.load(0)
    assert usable_tokens(document, tau=4, delay=1).tolist() == list(range(TOY.tokens - 2))
    assert usable_tokens(document, tau=4, delay=TOY.tokens).size == 0


def test_too_little_data_is_told(data: TrainingData) -> None:
    with pytest.raises(ConfigError, match="too few recorded tokens to train on: 22 in 1 documents"):
        TrainingSteps(data, [0], Sampling(DOCUMENTS_PER_STEP * 23, tau=4, delay=1, seed=0))
