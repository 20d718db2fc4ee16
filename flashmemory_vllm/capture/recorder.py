"""Watches the forward passes of one worker, layer by layer, and keeps what its requests attended to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from flashmemory_vllm.capture.document import Recording, Token
from flashmemory_vllm.capture.labels import block_mass, golden_votes
from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.indexer.neural_model import pooled_keys

# (layer, slots int32 [n]) -> keys [n, Hkv, block_size, D] after RoPE
ReadKeys = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Choices:
    """What to record, as the user chose it.

    Attributes:
        top_p: share of the mass that a layer's golden blocks hold.
        min_share: share of a head's attention that each of them holds.
        every: output tokens from one recorded token to the next.
        chunk_size: tokens in a chunk, over which keys are pooled; divides the block size.
        query_window: newest tokens of a prompt whose queries are kept, the last one among them.
        layer_mass: keep the mass of each layer, too.
    """

    top_p: float
    min_share: float
    every: int
    chunk_size: int
    query_window: int
    layer_mass: bool


@dataclass(frozen=True, slots=True)
class RecorderSettings:
    """What to record, and of which model.

    Attributes:
        num_layers: attention layers.
        anchor_layers: layers whose queries and pooled keys are kept.
        block_size: tokens in a block.
        softmax_scale: factor on `q . k`.
        choices: the user's.
    """

    num_layers: int
    anchor_layers: tuple[int, ...]
    block_size: int
    softmax_scale: float
    choices: Choices


@dataclass(frozen=True, slots=True, eq=False)
class BatchRow:
    """One request in one forward pass.

    Attributes:
        req_id: the request.
        prompt_len: tokens of its prompt.
        num_computed_tokens: tokens that have keys before the pass.
        num_tokens: tokens of the pass.
        slots: int32 [W] on the device, pages of its blocks in logical order; W may be more than there are.
    """

    req_id: str
    prompt_len: int
    num_computed_tokens: int
    num_tokens: int
    slots: torch.Tensor

    @property
    def seq_len(self) -> int:
        """Tokens that have keys once a layer has written its own."""
        return self.num_computed_tokens + self.num_tokens


@dataclass(slots=True, eq=False)
class _Request:
    """What is known of a request: by anchor layer pooled keys of some blocks each, and queries of some tokens each."""

    keys: dict[int, list[torch.Tensor]]
    prompt_queries: dict[int, list[torch.Tensor]]
    tokens: list[Token] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Now:
    """The token that a row is recorded for in this pass: [Hq, n] shares by layer, [Hq, D] queries by anchor."""

    row: BatchRow
    last_token: int
    shares: list[torch.Tensor] = field(default_factory=list)
    queries: list[torch.Tensor] = field(default_factory=list)


class Recorder:
    """Records requests whose attention is dense and whose blocks all lie on the device.

    `begin`, `layer` for each attention layer in order, `end`; once a request is finished, `take` its recording.

    Args:
        settings: what to record.
        read_keys: reads keys out of device pages.
    """

    def __init__(self, settings: RecorderSettings, read_keys: ReadKeys) -> None:
        self.settings = settings
        self._read_keys = read_keys
        self._requests: dict[str, _Request] = {}
        self._rows: Sequence[BatchRow] = ()
        self._now: list[_Now] = []
        # Rows that hold some of their prompt's newest tokens but the last: request, and where they lie in the batch
        self._asking: list[tuple[str, slice]] = []

    def begin(self, rows: Sequence[BatchRow]) -> None:
        """Learn the rows of the forward pass that begins.

        Raises:
            IntegrityError: a request goes on that was not seen from its beginning.
        """
        self._rows = rows
        self._now, self._asking = [], []
        bounds = np.cumsum([0, *(row.num_tokens for row in rows)]).tolist()
        anchors = self.settings.anchor_layers
        for row, (start, end) in zip(rows, pairwise(bounds), strict=True):
            if row.num_computed_tokens == 0:
                self._requests[row.req_id] = _Request(
                    {layer: [] for layer in anchors}, {layer: [] for layer in anchors}
                )
            elif row.req_id not in self._requests:
                raise IntegrityError(f"request {row.req_id}: recording begins with its first token, not in its middle")
            output = row.seq_len - row.prompt_len
            if output >= 0 and output % self.settings.choices.every == 0:
                self._now.append(_Now(row, end - 1))
            first = max(row.num_computed_tokens, row.prompt_len - self.settings.choices.query_window)
            last = min(row.seq_len, row.prompt_len - 1)
            if first < last:
                offset = start - row.num_computed_tokens
                self._asking.append((row.req_id, slice(first + offset, last + offset)))

    def layer(self, layer: int, query: torch.Tensor) -> None:
        """A layer has written its keys and attended.

        Args:
            layer: attention layer index.
            query: [T, Hq, D] after RoPE.
        """
        settings, size = self.settings, self.settings.block_size
        for now in self._now:
            num_blocks = -(-now.row.seq_len // size)
            own_query = query[now.last_token]
            keys = self._read_keys(layer, now.row.slots[:num_blocks])
            now.shares.append(block_mass(own_query, keys, now.row.seq_len, settings.softmax_scale))
            if layer in settings.anchor_layers:
                now.queries.append(own_query.half())
        if layer in settings.anchor_layers:
            for req_id, tokens in self._asking:
                self._requests[req_id].prompt_queries[layer].append(query[tokens].half().cpu())
            for row in self._rows:
                full = row.slots[row.num_computed_tokens // size : row.seq_len // size]
                if len(full):
                    pooled = pooled_keys(self._read_keys(layer, full), settings.choices.chunk_size)
                    self._requests[row.req_id].keys[layer].append(pooled.half().cpu())

    def end(self) -> None:
        """The forward pass is over.

        Raises:
            IntegrityError: layers are missing, as in a pass that was replayed from a graph.
        """
        for now in self._now:
            if len(now.shares) != self.settings.num_layers:
                raise IntegrityError(
                    f"request {now.row.req_id}: {len(now.shares)} of {self.settings.num_layers} layers were recorded"
                )
            self._requests[now.row.req_id].tokens.append(self._token(now))
        self._rows, self._now, self._asking = (), [], []

    def take(self, req_id: str) -> Recording:
        """Hand out what was recorded of a request, and forget it."""
        request = self._requests.pop(req_id)
        keys = [torch.cat(request.keys[layer]) for layer in self.settings.anchor_layers if request.keys[layer]]
        if not keys:
            raise IntegrityError(f"request {req_id}: it never filled a block, there is nothing to choose from")
        first = request.tokens[0].queries
        asked = [torch.cat(parts) for parts in request.prompt_queries.values() if parts]
        prompt_queries = torch.stack(asked, dim=1).numpy() if asked else np.empty((0, *first.shape), np.float16)
        return Recording(torch.stack(keys).numpy(), prompt_queries, request.tokens)

    def _token(self, now: _Now) -> Token:
        shares = torch.stack(now.shares)  # [L, Hq, n]
        by_layer = shares.mean(1)
        layer_mass = None
        choices = self.settings.choices
        if choices.layer_mass:
            layer_mass = torch.stack((by_layer, shares.amax(1))).half().cpu().numpy()
        return Token(
            position=now.row.seq_len - 1,
            queries=torch.stack(now.queries).cpu().numpy(),
            votes=golden_votes(shares, choices.top_p, choices.min_share).cpu().numpy(),
            mass=by_layer.mean(0).cpu().numpy(),
            layer_mass=layer_mass,
        )
