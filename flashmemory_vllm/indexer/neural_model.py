"""The neural indexer: one small dual encoder per anchor layer, from captured queries and pooled keys."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from flashmemory_kernels.ensemble_scores import Aggregate
from flashmemory_kernels.score_chunks import CODE_DTYPE, dequantise_codes, quantise_codes
from torch import nn
from torch.nn import functional

# Maximum, minimum and mean over a block's tokens.
NUM_POOLS = 3
_SCALE_BYTES = torch.float32.itemsize
NORM_EPS = 1e-6
# A channel that never changes is not blown up
_SMALLEST_SPREAD = 1e-3


@dataclass(frozen=True, slots=True)
class IndexerSpec:
    """Sizes of an indexer, and of the model and training that it belongs to; stored with its weights.

    Attributes:
        model: name of the model it was trained for.
        num_layers: attention layers of that model.
        num_query_heads: its query heads, Hq.
        num_kv_heads: its KV heads, Hkv.
        head_dim: elements of one key, D.
        block_size: tokens in a block.
        anchor_layers: attention-layer indices that it reads (A of them).
        rank: width R of the bottleneck between queries and index heads.
        num_heads: index heads, H.
        dim: elements E of a block's code.
        aggregate: how the layers' logits become one, "max" or "mean".
        threshold: probability from which a block is worth a slot.
        tau: steps between two selections that it was trained for.
        delay: steps from a query to the step before its selection is in force, as trained.
        data: SHA-256 of the `meta.json` of the data it was trained on.
    """

    model: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    anchor_layers: tuple[int, ...]
    rank: int
    num_heads: int
    dim: int
    aggregate: Aggregate
    threshold: float
    tau: int
    delay: int
    data: str

    @property
    def query_width(self) -> int:
        """Elements of one layer's queries."""
        return self.num_query_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Elements of one block's pooled keys in one layer."""
        return self.num_kv_heads * NUM_POOLS * self.head_dim

    @property
    def bytes_per_block(self) -> int:
        """Device bytes of one block's codes and scales, all anchor layers together."""
        return len(self.anchor_layers) * (self.dim * CODE_DTYPE.itemsize + _SCALE_BYTES)


class NeuralIndexer(nn.Module):
    """Scores blocks as the lightning indexer does (DeepSeek-V3.2; FlashMemory, arXiv 2606.09079).

    Per anchor layer and index head h: `logit(block) = sum_h gate_h * relu(query_h . code(block)) + bias`, and one
    weight on the logarithm of the block's distance. Queries and keys come after RoPE and already know where they
    are. The query side sees `q` and `|q|`, and the key side the maximum, minimum and mean of a block's keys: so the
    per-channel bound `max(q * max, q * min) = q (max + min) / 2 + |q| (max - min) / 2` is one of the products it can
    learn (Quest, arXiv 2406.10774; pooled keys as in SeerAttention-R, arXiv 2506.08889).

    Weights of all anchor layers are stacked along the first dim, A. `standardise` and `calibrate` fill the
    buffers; without them inputs are taken as they are and a probability is the sigmoid of the logit.

    Args:
        spec: sizes.
    """

    query_spread: torch.Tensor
    key_center: torch.Tensor
    key_spread: torch.Tensor
    calibration: torch.Tensor

    def __init__(self, spec: IndexerSpec) -> None:
        super().__init__()
        self.spec = spec
        layers, heads, dim, rank = len(spec.anchor_layers), spec.num_heads, spec.dim, spec.rank
        self.query_down = nn.Parameter(torch.empty(layers, 2 * spec.query_width, rank))
        self.query_norm = nn.Parameter(torch.empty(layers, rank))
        self.query_up = nn.Parameter(torch.empty(layers, rank, heads * dim))
        self.gate = nn.Parameter(torch.empty(layers, rank, heads))
        self.gate_bias = nn.Parameter(torch.empty(layers, heads))
        self.key_project = nn.Parameter(torch.empty(layers, spec.key_width, dim))
        self.key_norm = nn.Parameter(torch.empty(layers, dim))
        self.bias = nn.Parameter(torch.empty(layers))
        self.distance = nn.Parameter(torch.empty(layers))
        self.register_buffer("query_spread", torch.ones(layers, spec.query_width))
        self.register_buffer("key_center", torch.zeros(layers, spec.key_width))
        self.register_buffer("key_spread", torch.ones(layers, spec.key_width))
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]))

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the weights; gates start equal, the distance without a say."""
        for weight in (self.query_down, self.query_up, self.key_project):
            nn.init.normal_(weight, std=1 / sqrt(weight.shape[1]), generator=generator)
        for weight in (self.query_norm, self.key_norm):
            nn.init.ones_(weight)
        for weight in (self.gate, self.bias, self.distance):
            nn.init.zeros_(weight)
        # A product has the standard deviation sqrt(dim): start with logits of about one.
        nn.init.constant_(self.gate_bias, 1 / sqrt(self.spec.dim * self.spec.num_heads))

    def standardise(self, queries: torch.Tensor, pooled: torch.Tensor) -> None:
        """Take the inputs' spread and centre from samples; keys of real models have channels far off zero.

        Args:
            queries: [n, A, Hq, D].
            pooled: [m, A, Hkv, 3, D], maximum, minimum and mean of the keys of m blocks.
        """
        flat_queries, flat_keys = queries.float().flatten(2), pooled.float().flatten(2)
        self.query_spread.copy_(flat_queries.square().mean(0).sqrt().clamp(min=_SMALLEST_SPREAD))
        self.key_center.copy_(flat_keys.mean(0))
        self.key_spread.copy_(flat_keys.std(0, correction=0).clamp(min=_SMALLEST_SPREAD))

    def encode_queries(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [B, A, Hq, D] to index heads [B, A, H, E] and gates [B, A, H]."""
        scaled = queries.float().flatten(2) / self.query_spread
        both = torch.cat((scaled, scaled.abs()), dim=-1)
        hidden = torch.einsum("baf,afr->bar", both, self.query_down)
        hidden = functional.rms_norm(hidden, hidden.shape[-1:], eps=NORM_EPS) * self.query_norm
        heads = torch.einsum("bar,are->bae", hidden, self.query_up)
        gates = torch.einsum("bar,arh->bah", hidden, self.gate) + self.gate_bias
        return heads.view(*heads.shape[:2], self.spec.num_heads, self.spec.dim), gates

    def encode_keys(self, pooled: torch.Tensor) -> torch.Tensor:
        """Pooled keys [n, A, Hkv, 3, D] to codes [n, A, E], not rounded yet."""
        scaled = (pooled.float().flatten(2) - self.key_center) / self.key_spread
        codes = torch.einsum("naf,afe->nae", scaled, self.key_project)
        return functional.rms_norm(codes, codes.shape[-1:], eps=NORM_EPS) * self.key_norm

    def place(self, products: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """Add bias and distance to gated products.

        Args:
            products: [..., A, n].
            distance: [..., n], blocks from a block to the query's, 1 or more.
        """
        hint = self.distance.unsqueeze(-1) * distance.float().log().unsqueeze(-2)
        return products + self.bias.unsqueeze(-1) + hint

    def forward(
        self, queries: torch.Tensor, pooled: torch.Tensor, rows: torch.Tensor, distance: torch.Tensor
    ) -> torch.Tensor:
        """Logits of K blocks for each of B queries, with codes rounded as they are stored.

        Args:
            queries: [B, A, Hq, D].
            pooled: [M, A, Hkv, 3, D], blocks of any documents.
            rows: int64 [B, K], which of the M.
            distance: [B, K], see `place`.

        Returns:
            float32 [B, A, K].
        """
        heads, gates = self.encode_queries(queries)
        codes = self.encode_keys(pooled)
        # Forward the rounded codes, backward as if they were not.
        codes = codes + (dequantise_codes(*quantise_codes(codes)) - codes).detach()
        products = torch.einsum("bahe,bkae->bahk", heads, codes.to(heads.dtype)[rows]).float().relu()
        return self.place(torch.einsum("bah,bahk->bak", gates.float(), products), distance)

    def probability(self, logits: torch.Tensor) -> torch.Tensor:
        """Calibrated probability that a block is needed, from logits of an ensemble, any shape."""
        return torch.addcmul(self.calibration[1], self.calibration[0], logits).sigmoid()

    def calibrate(self, slope: float, offset: float) -> None:
        """Set what `probability` applies to a logit."""
        self.calibration.copy_(torch.tensor([slope, offset]))


def ensemble(logits: torch.Tensor, aggregate: Aggregate) -> torch.Tensor:
    """One logit of several layers', [..., A, n] to [..., n]."""
    return logits.amax(-2) if aggregate == "max" else logits.mean(-2)
