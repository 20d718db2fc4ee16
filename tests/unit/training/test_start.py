"""The start: factors are the best of their rank, and blocks are ranked nearly as mean keys rank them."""

from pathlib import Path

import torch

from flashmemory_vllm.indexer.neural_model import NeuralIndexer
from flashmemory_vllm.training.dataset import TrainingData
from flashmemory_vllm.training.processes import Processes
from flashmemory_vllm.training.start import factors, start_from_data
from flashmemory_vllm.training.settings import TrainSettings, make_spec
from flashmemory_vllm.training.validation import Validation
from tests.unit.training.recordings import Toy, write_recordings


def _error(queries: torch.Tensor, keys: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
    keys = keys - keys.mean(0)
    return float((queries @ keys.mT - queries @ left @ right.mT @ keys.mT).square().mean())


def test_no_subspace_of_the_same_width_is_nearer_to_the_products() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(500, 12, generator=generator) * torch.linspace(0.1, 3, 12)
    keys = torch.randn(400, 12, generator=generator) * torch.linspace(2, 0.1, 12) + 5
    best = _error(queries, keys, *factors(queries, keys, 4))
    for _ in range(50):
        basis = torch.linalg.qr(torch.randn(12, 4, generator=generator))[0]
        assert best < _error(queries, keys, basis, basis)
    # With its full width nothing is lost but what the ridge takes.
    exact = _error(queries, keys, *factors(queries, keys, 12))
    assert exact < 1e-6 * float((queries @ (keys - keys.mean(0)).mT).square().mean())


def test_an_indexer_that_starts_from_data_beats_a_drawn_one(tmp_path: Path) -> None:
    write_recordings(tmp_path, Toy(documents=12))
    data = TrainingData(tmp_path)
    validation = Validation(data, range(8, 12), tau=6, delay=1, limit=16)
    model = NeuralIndexer(make_spec(data, TrainSettings(rank=32, heads=4, dim=32))).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    drawn = Processes().mean(validation.run(model))["mass@0.135"]
    start_from_data(model, data, range(8))
    assert Processes().mean(validation.run(model))["mass@0.135"] > drawn + 0.05


def test_a_bottleneck_too_narrow_for_every_head_starts_drawn(tmp_path: Path) -> None:
    write_recordings(tmp_path, Toy(documents=2, tokens=8))
    data = TrainingData(tmp_path)
    model = NeuralIndexer(make_spec(data, TrainSettings(rank=2, heads=4, dim=32)))
    model.init_weights(torch.Generator().manual_seed(0))
    drawn = model.query_down.clone()
    start_from_data(model, data, [0])
    assert torch.equal(model.query_down, drawn)
    assert not torch.equal(model.key_center, torch.zeros_like(model.key_center))
