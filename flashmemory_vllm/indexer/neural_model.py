"""The neural indexer: one small dual encoder per anchor layer, from captured queries and pooled keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt
from typing import NamedTuple

import torch
from flashmemory_kernels.common import Aggregate
from flashmemory_kernels.score_chunks import CODE_DTYPE, Ensemble, dequantise_codes, quantise_codes
from torch import nn
from torch.nn import functional

from flashmemory_vllm.indexer.forecast_model import ForecastHead

# Maximum, minimum and mean over a chunk's tokens.
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
        block_size: tokens in a block, as trained. Serving may have others, see `at`.
        chunk_size: tokens in a chunk, each of which has a code; divides the block size.
        reach: chunks at the end of a block that speak for the block after it, too.
        query_window: newest tokens of a prompt that a request's first selection is made with.
        opening_steps: decode steps of a request that each end with a selection of their own, as trained.
        anchor_layers: those that it reads (A of them), counted among its layers of full attention.
        rank: width R of the bottleneck between queries and index heads.
        num_heads: index heads, H.
        dim: elements E of a chunk's code.
        aggregate: how the layers' logits become one, "max" or "mean".
        threshold: probability from which a block is worth a slot.
        tau: steps between two selections that it was trained for.
        delay: steps from a query to the step before its selection is in force, as trained.
        data: SHA-256 of the `meta.json` of the data it was trained on.
        memory_decays: channels of the memory that its head reads, see `ForecastHead`; none: there is no head.
        forecast_threshold: share expected by the forecast from which a block is worth a slot.
    """

    model: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    chunk_size: int
    reach: int
    query_window: int
    opening_steps: int
    anchor_layers: tuple[int, ...]
    rank: int
    num_heads: int
    dim: int
    aggregate: Aggregate
    threshold: float
    tau: int
    delay: int
    data: str
    memory_decays: tuple[float, ...] = ()
    forecast_threshold: float = 0.5

    @property
    def query_width(self) -> int:
        """Elements of one layer's queries."""
        return self.num_query_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Elements of one chunk's pooled keys in one layer."""
        return self.num_kv_heads * NUM_POOLS * self.head_dim

    @property
    def chunks_per_block(self) -> int:
        """Chunks of one block, C."""
        return self.block_size // self.chunk_size

    def serves(self, block_size: int) -> bool:
        """Whether blocks of so many tokens are whole chunks, and as many of them as speak for the next block."""
        return block_size % self.chunk_size == 0 and block_size >= max(1, self.reach) * self.chunk_size

    def at(self, block_size: int) -> IndexerSpec:
        """The same weights over blocks of another size: codes, distances and reach are those of chunks."""
        return replace(self, block_size=block_size)

    @property
    def bytes_per_block(self) -> int:
        """Device bytes of one block's codes and scales, all anchor layers together; without a forecast's keys."""
        return len(self.anchor_layers) * self.chunks_per_block * (self.dim * CODE_DTYPE.itemsize + _SCALE_BYTES)

    @property
    def key_bytes_per_block(self) -> int:
        """Device bytes of one block's keys in fp8, which a forecast is made of; 0 without a head."""
        of_head = self.block_size * self.head_dim * CODE_DTYPE.itemsize + _SCALE_BYTES
        return len(self.anchor_layers) * self.num_kv_heads * of_head if self.memory_decays else 0


class QueryWeights(NamedTuple):
    """Arguments of `project_queries` behind the queries."""

    spread: torch.Tensor
    down: torch.Tensor
    norm: torch.Tensor
    up: torch.Tensor
    gate: torch.Tensor
    gate_bias: torch.Tensor
    eps: float


class NeuralIndexer(nn.Module):
    """Scores chunks of blocks as the lightning indexer does (DeepSeek-V3.2; FlashMemory, arXiv 2606.09079).

    Per anchor layer and index head h: `logit(chunk) = sum_h gate_h * relu(query_h . code(chunk)) + bias`, and one
    weight on the logarithm of the chunk's distance. A block is worth what its best chunk is worth: a fact of a few
    tokens drowns in one code for a whole block. Who finds a fact reads on, so the last chunks of a block speak for the
    next block as well, with an offset that depends on how far they are from it.

    Queries and keys come after RoPE and already know where they
    are. The query side sees `q` and `|q|`, and the key side the maximum, minimum and mean of a chunk's keys: so the
    per-channel bound `max(q * max, q * min) = q (max + min) / 2 + |q| (max - min) / 2` is one of the products it can
    learn (Quest, arXiv 2406.10774; pooled keys as in SeerAttention-R, arXiv 2506.08889).

    With `memory_decays` a `head` makes a logit of what a block's content says and of what heads paid to it before.

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
        self.reach_offset = nn.Parameter(torch.empty(layers, spec.reach))
        self.register_buffer("query_spread", torch.ones(layers, spec.query_width))
        self.register_buffer("key_center", torch.zeros(layers, spec.key_width))
        self.register_buffer("key_spread", torch.ones(layers, spec.key_width))
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]))
        self.head = ForecastHead(spec.memory_decays) if spec.memory_decays else None

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the weights; gates start equal, the distance without a say."""
        for weight in (self.query_down, self.query_up, self.key_project):
            nn.init.normal_(weight, std=1 / sqrt(weight.shape[1]), generator=generator)
        for weight in (self.query_norm, self.key_norm):
            nn.init.ones_(weight)
        for weight in (self.gate, self.bias, self.distance, self.reach_offset):
            nn.init.zeros_(weight)
        # A product has the standard deviation sqrt(dim): start with logits of about one.
        nn.init.constant_(self.gate_bias, 1 / sqrt(self.spec.dim * self.spec.num_heads))
        if self.head is not None:
            self.head.init_weights(generator)

    def standardise(self, queries: torch.Tensor, pooled: torch.Tensor) -> None:
        """Take the inputs' spread and centre from samples; keys of real models have channels far off zero.

        Args:
            queries: [n, A, Hq, D].
            pooled: [m, A, Hkv, 3, D], maximum, minimum and mean of the keys of m chunks.
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
            distance: [..., n], chunks from a chunk to the end of the last full block, 1 or more.
        """
        hint = self.distance.unsqueeze(-1) * distance.float().log().unsqueeze(-2)
        return products + self.bias.unsqueeze(-1) + hint

    def forward(self, queries: torch.Tensor, pooled: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """Logits of M blocks for each of Q queries of N documents, with codes rounded as they are stored.

        Args:
            queries: [N, Q, A, Hq, D].
            pooled: [N, M, R + C, A, Hkv, 3, D], of each block the last R chunks of the block before it, and its own C.
            distance: [N, Q, M], chunks from a block's first one to the end of the query's last full block.

        Returns:
            float32 [N, Q, A, M].
        """
        size, blocks = queries.shape[:2], pooled.shape[:3]
        heads, gates = (part.view(*size, *part.shape[1:]) for part in self.encode_queries(queries.flatten(0, 1)))
        codes = self.encode_keys(pooled.flatten(0, 2))
        # Forward the rounded codes, backward as if they were not.
        codes = codes + (dequantise_codes(*quantise_codes(codes)) - codes).detach()
        codes = codes.to(heads.dtype).view(*blocks, *codes.shape[1:])
        products = torch.einsum("nqahe,nmcae->nqahmc", heads, codes).float().relu()
        summed = torch.einsum("nqah,nqahmc->nqamc", gates.float(), products)
        place_in_block = torch.arange(pooled.shape[2], device=distance.device) - self.spec.reach
        # Before the first block, which is sink, there is nothing; what stands in for it may lie beyond the end
        distances = (distance.unsqueeze(-1) - place_in_block).clamp(min=1)
        logits = self.place(summed.flatten(3), distances.flatten(2)).view_as(summed)
        offset = functional.pad(self.reach_offset, (0, self.spec.chunks_per_block))
        return (logits + offset.unsqueeze(1)).amax(-1)

    @property
    def query_weights(self) -> QueryWeights:
        """What `project_queries` takes behind the queries."""
        weights = self.query_down, self.query_norm, self.query_up, self.gate, self.gate_bias
        return QueryWeights(self.query_spread, *weights, NORM_EPS)

    def ensemble(self, groups: torch.Tensor) -> Ensemble:
        """What `score_chunks` makes one logit of, given the layer group of each anchor layer, int32 [A]."""
        return Ensemble(self.bias, self.distance, self.reach_offset, groups, self.spec.aggregate)

    def probability(self, logits: torch.Tensor) -> torch.Tensor:
        """Calibrated probability that a block is needed, from logits of an ensemble, any shape."""
        return calibrated(logits, self.calibration)

    def calibrate(self, slope: float, offset: float) -> None:
        """Set what `probability` applies to a logit."""
        self.calibration.copy_(torch.tensor([slope, offset]))


def calibrated(logits: torch.Tensor, calibration: torch.Tensor) -> torch.Tensor:
    """Probability of logits, any shape, under a calibration [2] of slope and offset."""
    return torch.addcmul(calibration[1], calibration[0], logits).sigmoid()


def pooled_keys(keys: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Maximum, minimum and mean over the tokens of each chunk of each block.

    Args:
        keys: [n, Hkv, block_size, D] of full blocks.
        chunk_size: tokens of a chunk; divides the block size.

    Returns:
        float32 [n * block_size / chunk_size, Hkv, 3, D], chunks in the order of their tokens.
    """
    num_blocks, num_heads, _, head_dim = keys.shape
    by_chunk = keys.float().reshape(num_blocks, num_heads, -1, chunk_size, head_dim).transpose(1, 2).flatten(0, 1)
    return torch.stack((by_chunk.amax(2), by_chunk.amin(2), by_chunk.mean(2)), dim=2)
