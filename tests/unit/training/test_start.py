"""The start: factors are the best of their rank; an index head's products are nearly a query head's with mean keys."""

from pathlib import Path

import torch

from flashmemory_vllm.indexer.neural_model import NeuralIndexer
from flashmemory_vllm.training.dataset import Document, TrainingData
from flashmemory_vllm.training.settings import TrainSettings, make_spec
from flashmemory_vllm.training.start import factors, start_from_data
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


def _agreement(model: NeuralIndexer, document: Document, anchor: int) -> float:
    """Smallest correlation, over the heads, of an index head's products with those of queries and mean keys."""
    with torch.no_grad():
        heads, _ = model.encode_queries(document.queries)
        codes = model.encode_keys(document.keys.transpose(0, 1))
    products = torch.einsum("the,ke->htk", heads[:, anchor], codes[:, anchor]).flatten(1)
    means = document.keys[anchor, :, :, 2].float().repeat_interleave(2, dim=1)
    means -= means.mean(0)  # what is the same for all chunks ranks none
    exact = torch.einsum("thd,khd->htk", document.queries[:, anchor].float(), means).flatten(1)
    return min(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(products, exact, strict=True))


def test_an_indexer_starts_with_the_products_of_queries_and_keys(tmp_path: Path) -> None:
    write_recordings(tmp_path, Toy(documents=12))
    data = TrainingData(tmp_path)
    model = NeuralIndexer(make_spec(data, TrainSettings(dim=64, query_window=4))).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    assert _agreement(model, data.load(11), 1) < 0.2
    start_from_data(model, data, range(8))
    for anchor in range(2):
        assert _agreement(model, data.load(11), anchor) > 0.8


def test_a_bottleneck_too_narrow_for_every_head_starts_drawn(tmp_path: Path) -> None:
    write_recordings(tmp_path, Toy(documents=2, tokens=8))
    data = TrainingData(tmp_path)
    model = NeuralIndexer(make_spec(data, TrainSettings(rank=2, heads=4, dim=32)))
    model.init_weights(torch.Generator().manual_seed(0))
    drawn = model.query_down.clone()
    start_from_data(model, data, [0])
    assert torch.equal(model.query_down, drawn)
    assert not torch.equal(model.key_center, torch.zeros_like(model.key_center))
