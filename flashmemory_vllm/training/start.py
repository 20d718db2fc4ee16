"""Where training starts: an indexer that already ranks blocks nearly as their mean keys would."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashmemory_vllm.indexer.neural_model import NUM_POOLS, NeuralIndexer
from flashmemory_vllm.training.batches import Batch
from flashmemory_vllm.training.calibration import fit_platt
from flashmemory_vllm.training.dataset import TrainingData
from flashmemory_vllm.training.selections import by_selection

# Documents, and of each the tokens and chunks, that the statistics are taken from
_SAMPLED_DOCUMENTS = 24
_SAMPLED_TOKENS = 64
_SAMPLED_CHUNKS = 256
# Of the mean eigenvalue; keeps directions that the samples hardly have from being blown up
_RIDGE = 1e-2
# Beside the products that are wanted, so that equal heads can part
_NOISE = 0.1
_MEAN = NUM_POOLS - 1


@torch.no_grad()
def start_from_data(model: NeuralIndexer, data: TrainingData, documents: Sequence[int]) -> None:
    """Standardise the inputs and set the weights to the best products of low rank with the mean keys.

    A random start has to learn from examples alone that a query looks for keys like itself, and with few documents
    learns the documents by heart instead. For each KV head the weights here are the two factors of rank r whose product
    is closest to `q . k` over sampled queries q and mean keys k, in the least squares sense. Their width is what
    the code has for each KV head and the bottleneck for each query head: with the sizes that `train` chooses by itself
    it is all of a small head. The rest of the weights stays as drawn, but smaller.

    Args:
        model: with drawn weights; is changed.
        data: recordings.
        documents: those to train on.
    """
    queries, pooled = _sample(data, documents)
    model.standardise(queries, pooled)
    spec = model.spec
    width = min(spec.dim // spec.num_kv_heads, spec.rank // spec.num_query_heads, spec.head_dim)
    if width:
        for anchor in range(len(spec.anchor_layers)):
            means = pooled[:, anchor, :, _MEAN].float()
            down, up, project = _matched(model, anchor, queries[:, anchor].float(), means, width)
            _replace(model.query_down[anchor], down)
            _replace(model.query_up[anchor], up)
            _replace(model.key_project[anchor], project)


@torch.no_grad()
def calibrate_layers(model: NeuralIndexer, batches: Sequence[Batch]) -> None:
    """Scale each layer's gates, and set its bias, so that its first logits are already probabilities.

    The optimiser moves all weights at about the same speed. If logits were off, it would take the gates to zero long
    before the bias had moved, and the start would be lost.

    Args:
        model: with weights to start from; is changed.
        batches: samples as training will see them.
    """
    logits, labels = [], []
    for batch in batches:
        is_sample = batch.weights > 0
        by_layer = model(batch.queries, batch.pooled, batch.distance).transpose(1, 2)  # [N, A, Q, M]
        asked = by_selection(by_layer, model.spec.query_window)
        logits.append(asked.transpose(0, 1)[:, is_sample])
        labels.append(batch.labels[is_sample])
    for anchor, of_layer in enumerate(torch.cat(logits, dim=1)):
        slope, offset = fit_platt(of_layer, torch.cat(labels))
        model.gate_bias[anchor] *= slope
        model.bias[anchor] = offset


def _replace(drawn: torch.Tensor, wanted: torch.Tensor) -> None:
    """Put other weights in place of drawn ones at the same scale, which the learning rate is meant for."""
    scale = drawn.norm() / wanted.norm()
    drawn.mul_(_NOISE).add_(wanted * scale)


def _matched(
    model: NeuralIndexer, anchor: int, queries: torch.Tensor, means: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weights of one layer, in the shapes of the model's; queries [n, Hq, D], means [m, Hkv, D]."""
    spec = model.spec
    group = spec.num_query_heads // spec.num_kv_heads
    down = torch.zeros(2, spec.num_query_heads, spec.head_dim, spec.rank)
    up = torch.zeros(spec.rank, spec.num_heads, spec.dim)
    project = torch.zeros(spec.num_kv_heads, NUM_POOLS, spec.head_dim, spec.dim)
    query_spread = model.query_spread[anchor].view(spec.num_query_heads, spec.head_dim)
    key_spread = model.key_spread[anchor].view(spec.num_kv_heads, NUM_POOLS, spec.head_dim)
    for kv_head in range(spec.num_kv_heads):
        members = range(kv_head * group, (kv_head + 1) * group)
        of_queries, of_keys = factors(queries[:, members.start : members.stop].flatten(0, 1), means[:, kv_head], width)
        place = slice(kv_head * width, (kv_head + 1) * width)
        project[kv_head, _MEAN, :, place] = of_keys * key_spread[kv_head, _MEAN].unsqueeze(-1)
        for head in members:
            hidden = slice(head * width, (head + 1) * width)
            down[0, head, :, hidden] = of_queries * query_spread[head].unsqueeze(-1)
            up[hidden, head % spec.num_heads, place] = torch.eye(width)
    return down.flatten(0, 2), up.flatten(1), project.flatten(0, 2)


def factors(queries: torch.Tensor, keys: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two projections to `width` under which products are nearest to those of queries and centred keys.

    With covariances Q and K the mean squared error of `q' M k` is `|Q^1/2 (I - M) K^1/2|^2`: its minimum of a given
    rank is the truncated singular value decomposition of `Q^1/2 K^1/2`, with both roots undone.

    Args:
        queries: [n, D].
        keys: [m, D].
        width: rank of the product.

    Returns:
        Projections of queries and of keys, [D, width] each.
    """
    roots = [_root(queries), _root(keys - keys.mean(0))]
    left, strength, right = torch.linalg.svd(roots[0] @ roots[1])
    share = strength[:width].sqrt()
    of_queries = torch.linalg.solve(roots[0], left[:, :width] * share)
    return of_queries, torch.linalg.solve(roots[1], right.mT[:, :width] * share)


def _root(rows: torch.Tensor) -> torch.Tensor:
    """Symmetric square root of the second moment of rows [n, D], never singular."""
    values, vectors = torch.linalg.eigh(rows.mT @ rows / len(rows))
    values = values.clamp(min=0) + _RIDGE * values.mean() + torch.finfo(values.dtype).tiny
    root: torch.Tensor = (vectors * values.sqrt()) @ vectors.mT
    return root


def _sample(data: TrainingData, documents: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [n, A, Hq, D] and pooled keys [m, A, Hkv, 3, D] of chunks, evenly spaced over the first documents."""
    queries, pooled = [], []
    for document in map(data.load, documents[:_SAMPLED_DOCUMENTS]):
        tokens = torch.linspace(0, len(document) - 1, min(len(document), _SAMPLED_TOKENS)).long()
        num_chunks = document.keys.shape[1]
        chunks = torch.linspace(0, num_chunks - 1, min(num_chunks, _SAMPLED_CHUNKS)).long()
        queries.append(document.queries[tokens])
        pooled.append(document.keys[:, chunks].transpose(0, 1))
    return torch.cat(queries), torch.cat(pooled)
