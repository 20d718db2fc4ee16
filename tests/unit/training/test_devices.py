"""Nothing of a recording, which lies on the CPU, meets what an indexer has on a GPU: found out without one."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.project_queries.naive import project_queries_naive
from torch._subclasses.fake_tensor import FakeTensorMode

from flashmemory_vllm.indexer.indexed import IndexedSelector
from flashmemory_vllm.indexer.neural_model import NeuralIndexer
from flashmemory_vllm.training import baselines, evaluation
from flashmemory_vllm.training.baselines import Baseline, baseline_scorer
from flashmemory_vllm.training.batches import Batch, Sampling, TrainingSteps
from flashmemory_vllm.training.dataset import Document, Schedule, TrainingData
from flashmemory_vllm.training.evaluation import IndexerScorer
from flashmemory_vllm.training.losses import attention_loss
from flashmemory_vllm.training.selections import Selections
from flashmemory_vllm.training.settings import TrainSettings, make_spec
from tests.unit.training.recordings import Toy, write_recordings

# Not CUDA, which a torch without it cannot index
OTHER = torch.device("cpu", 1)
SETTINGS = TrainSettings(rank=16, heads=4, dim=32, decays=(0.0, 0.9), query_window=3)


def _expect_other(*tensors: torch.Tensor) -> None:
    assert {tensor.device for tensor in tensors} == {OTHER}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    folder: Path = tmp_path_factory.mktemp("data")
    write_recordings(folder, Toy(documents=1, tokens=8))
    return TrainingData(folder)


@pytest.fixture
def document(data: TrainingData) -> Document:
    return data.load(0)


@pytest.fixture
def batch(data: TrainingData) -> Batch:
    spec = make_spec(data, SETTINGS)
    return TrainingSteps(data, [0], Sampling(1, 2, 3, spec.reach, Schedule(4, 1, 2), SETTINGS.decays, seed=0))[0]


@pytest.fixture
def devices(batch: Batch, document: Document, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors without data that know their device; kernels, which need data, only look at those of theirs."""
    del batch, document  # made with data, so before

    def score_chunks(*arguments: Any) -> None:
        *tensors, ensemble, logits = arguments
        _expect_other(*tensors, *ensemble[:4], logits)

    def due_rows(requests: list[object], device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(on_device=torch.zeros(len(requests), len(Due), device=device))

    monkeypatch.setattr(evaluation, "score_chunks", score_chunks)
    monkeypatch.setattr(evaluation, "project_queries", project_queries_naive)
    for module in (evaluation, baselines):
        monkeypatch.setattr(module, "due_rows", due_rows)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def _model(data: TrainingData) -> NeuralIndexer:
    with OTHER:
        return NeuralIndexer(make_spec(data, SETTINGS))


@pytest.mark.usefixtures("devices")
def test_an_indexer_scores_where_it_is(data: TrainingData, document: Document) -> None:
    scorer = IndexerScorer(_model(data), document)
    for token in (0, 5):
        _expect_other(*scorer.both(token))


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("name", ["bounds", "mean"])
def test_selectors_that_read_keys_do_so_where_they_are_told(
    name: Baseline, data: TrainingData, document: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remember(selector: IndexedSelector, due: Any, state: Any) -> None:
        _expect_other(selector.index, due.on_device, state.queries, state.block_ids, state.memory, state.in_set)

    monkeypatch.setattr(IndexedSelector, "remember", remember)
    _expect_other(baseline_scorer(name, document, data.meta, [], OTHER)(5))


@pytest.mark.usefixtures("devices")
def test_a_batch_is_learnt_from_where_the_indexer_is(data: TrainingData, batch: Batch) -> None:
    there = Batch(*(tensor.to(OTHER) for tensor in batch))
    logits = Selections(_model(data))(there)
    assert logits.forecast is not None
    for of_way in logits:
        _expect_other(attention_loss(of_way, there.labels, there.weights))


@pytest.mark.usefixtures("devices")
def test_a_mix_is_found_out(document: Document) -> None:
    with pytest.raises(RuntimeError, match="device"):
        document.keys.to(OTHER) + document.keys
