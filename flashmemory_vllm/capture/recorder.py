"""Watches the forward passes of one worker, layer by layer, and keeps what its requests attended to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import numpy as np
import torch

from flashmemory_vllm.capture.document import Half, Recording, Token, padded_rows
from flashmemory_vllm.capture.labels import block_mass, full_shares
from flashmemory_vllm.capture.passes import BatchRow, Part, Pass
from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.indexer.neural_model import pooled_keys

# (layer, slots int32 [n]) -> keys [n, Hkv, block_size, D] after RoPE
ReadKeys = Callable[[int, torch.Tensor], torch.Tensor]
# Elements of keys, or of their products with queries, that one pass over a layer has in float32: 512 MiB
PASS_ELEMENTS = 1 << 27


@dataclass(frozen=True, slots=True)
class Choices:
    """What to record, as the user chose it.

    Attributes:
        every: output tokens from one recorded token to the next.
        chunk_size: tokens in a chunk, over which keys are pooled; divides the block size.
        query_window: newest tokens of a prompt whose queries are kept, the last one among them.
        layer_mass: keep the mass of each layer, too.
    """

    every: int
    chunk_size: int
    query_window: int
    layer_mass: bool


@dataclass(frozen=True, slots=True)
class RecorderSettings:
    """What to record, and of which model.

    Attributes:
        num_layers: attention layers.
        num_query_heads: query heads.
        key_width: elements of one token's keys in a layer, of all KV heads.
        anchor_layers: layers whose queries and pooled keys are kept, ascending.
        block_size: tokens in a block.
        softmax_scale: factor on `q . k`.
        choices: the user's.
    """

    num_layers: int
    num_query_heads: int
    key_width: int
    anchor_layers: tuple[int, ...]
    block_size: int
    softmax_scale: float
    choices: Choices


@dataclass(slots=True, eq=False)
class _Request:
    """What is known of a request.

    Attributes:
        keys: pooled keys [A, m, Hkv, 3, D] of some blocks each.
        asked: of each of the prompt's newest tokens but the last, queries [A, Hq, D] and anchor shares [n].
        tokens: the recorded ones.
    """

    keys: list[torch.Tensor] = field(default_factory=list)
    asked: list[tuple[Half, Half]] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)


class Recorder:
    """Records requests whose attention is dense and whose blocks all lie on the device.

    `begin`, `layer` for each attention layer in order, `end`; once a request is finished, `take` its recording. All
    rows of a batch that have as many tokens to be recorded go through a layer together, and the host waits for their
    results once a batch.

    Args:
        settings: what to record.
        read_keys: reads keys out of device pages.
    """

    def __init__(self, settings: RecorderSettings, read_keys: ReadKeys) -> None:
        self.settings = settings
        self._read_keys = read_keys
        self._requests: dict[str, _Request] = {}
        self._passes: list[Pass] = []
        # Rows with blocks that become full: request and number of blocks; all their pages, and what is pooled of them
        self._filling: list[tuple[str, int]] = []
        self._full: torch.Tensor | None = None
        self._pooled: list[torch.Tensor] = []

    def begin(self, rows: Sequence[BatchRow]) -> None:
        """Learn the rows of the forward pass that begins.

        Raises:
            IntegrityError: a request goes on that was not seen from its beginning.
        """
        self._clear()
        size = self.settings.block_size
        full: list[torch.Tensor] = []
        asked: list[Part] = []
        recorded: list[Part] = []
        starts = accumulate((row.num_tokens for row in rows), initial=0)
        for row, start in zip(rows, starts, strict=False):
            if row.num_computed_tokens == 0:
                self._requests[row.req_id] = _Request()
            elif row.req_id not in self._requests:
                raise IntegrityError(f"request {row.req_id}: recording begins with its first token, not in its middle")
            offset = start - row.num_computed_tokens
            asked += [Part(row, offset, some) for some in self._parts(row, self._question(row))]
            recorded += [Part(row, offset, some) for some in self._parts(row, self._recorded(row))]
            filled = row.slots[row.num_computed_tokens // size : row.seq_len // size]
            if len(filled):
                full.append(filled)
                self._filling.append((row.req_id, len(filled)))
        self._full = torch.cat(full) if full else None
        for parts in (asked, recorded):
            for _, alike in groupby(parts, key=lambda part: len(part.positions)):
                self._passes += self._make_passes(list(alike), is_question=parts is asked)

    def layer(self, layer: int, query: torch.Tensor) -> None:
        """A layer has written its keys and attended.

        Args:
            layer: attention layer index.
            query: [T, Hq, D] after RoPE.
        """
        is_anchor = layer in self.settings.anchor_layers
        for one in self._passes:
            if is_anchor or not one.is_question:
                self._look(one, layer, query[one.places], is_anchor=is_anchor)
        if is_anchor and self._full is not None:
            pooled = pooled_keys(self._read_keys(layer, self._full), self.settings.choices.chunk_size)
            self._pooled.append(pooled.half())

    def end(self) -> None:
        """The forward pass is over.

        Raises:
            IntegrityError: layers are missing, as in a pass that was replayed from a graph.
        """
        for one in self._passes:
            if not one.is_question and one.num_layers != self.settings.num_layers:
                raise IntegrityError(
                    f"request {one.req_ids[0]}: {one.num_layers} of {self.settings.num_layers} layers were recorded"
                )
            self._keep(one)
        if self._filling:
            chunks = self.settings.block_size // self.settings.choices.chunk_size
            pooled, start = torch.stack(self._pooled).cpu(), 0
            for req_id, count in self._filling:
                self._requests[req_id].keys.append(pooled[:, start : start + count * chunks])
                start += count * chunks
        self._clear()

    def take(self, req_id: str) -> Recording:
        """Hand out what was recorded of a request, and forget it."""
        request = self._requests.pop(req_id)
        if not request.keys:
            raise IntegrityError(f"request {req_id}: it never filled a block, there is nothing to choose from")
        first, keys = request.tokens[0], torch.cat(request.keys, dim=1).numpy()
        if not request.asked:
            return Recording(keys, first.queries[None][:0], first.of_anchors[None][:0], request.tokens)
        queries, shares = zip(*request.asked, strict=True)
        return Recording(keys, np.stack(queries), padded_rows(shares), request.tokens)

    def _clear(self) -> None:
        self._passes, self._filling, self._full, self._pooled = [], [], None, []

    def _question(self, row: BatchRow) -> range:
        """Positions of those of the prompt's newest tokens but the last that the pass has."""
        first = max(row.num_computed_tokens, row.prompt_len - self.settings.choices.query_window)
        return range(first, min(row.seq_len, row.prompt_len - 1))

    def _recorded(self, row: BatchRow) -> range:
        """Positions of a row's tokens to be recorded."""
        every = self.settings.choices.every
        first = max(row.num_computed_tokens, row.prompt_len - 1)
        return range(first + -(first - row.prompt_len + 1) % every, row.seq_len, every)

    def _parts(self, row: BatchRow, positions: range) -> list[list[int]]:
        """Positions in parts that one pass can take."""
        most = max(1, PASS_ELEMENTS // (row.seq_len * self.settings.num_query_heads))
        return [list(positions[at : at + most]) for at in range(0, len(positions), most)]

    def _make_passes(self, alike: Sequence[Part], *, is_question: bool) -> list[Pass]:
        """Passes of parts with as many tokens each."""
        width = max(len(alike[0].positions) * self.settings.num_query_heads, self.settings.key_width)
        longest = max(part.row.seq_len for part in alike)
        at_once = max(1, PASS_ELEMENTS // (longest * width))
        parts = [alike[at : at + at_once] for at in range(0, len(alike), at_once)]
        return [self._make_pass(part, is_question=is_question) for part in parts]

    def _make_pass(self, alike: Sequence[Part], *, is_question: bool) -> Pass:
        rows, positions = [part.row for part in alike], [part.positions for part in alike]
        device = rows[0].slots.device
        num_blocks = [-(-row.seq_len // self.settings.block_size) for row in rows]
        at = torch.tensor(positions, device=device)
        slots = torch.stack([row.slots[: max(num_blocks)] for row in rows])
        # Whatever the table holds behind a row's blocks: any page will do, its keys are later than the token
        is_own = torch.arange(slots.shape[1], device=device) < torch.tensor(num_blocks, device=device).unsqueeze(1)
        shape = (*at.shape, slots.shape[1])
        return Pass(
            is_question=is_question,
            req_ids=[row.req_id for row in rows],
            positions=positions,
            places=at + torch.tensor([part.offset for part in alike], device=device).unsqueeze(1),
            at=at,
            slots=slots.masked_fill(~is_own, 0),
            largest=torch.zeros(shape, device=device),
            of_anchors=torch.zeros(shape, device=device),
            mass=torch.zeros(shape, device=device),
        )

    def _look(self, one: Pass, layer: int, queries: torch.Tensor, *, is_anchor: bool) -> None:
        """Add what a layer's queries [R, T, Hq, D] attend to."""
        keys = self._read_keys(layer, one.slots.flatten())
        by_row = keys.view(*one.slots.shape, *keys.shape[1:])
        shares = block_mass(queries, by_row, one.at, self.settings.softmax_scale)
        if is_anchor:
            one.queries.append(queries.half())
            # A memory is brought up to date at the end of the step: the block that the token fills is among the full
            of_full = full_shares(shares, (one.at + 1) // self.settings.block_size)
            torch.maximum(one.of_anchors, of_full.amax(2), out=one.of_anchors)
        if one.is_question:
            return
        mass, largest = shares.mean(2), shares.amax(2)
        one.num_layers += 1
        one.mass += mass
        torch.maximum(one.largest, largest, out=one.largest)
        if self.settings.choices.layer_mass:
            one.by_layer.append(torch.stack((mass, largest)).half())

    def _keep(self, one: Pass) -> None:
        """Fetch what a pass has found, and give each token its part."""
        queries = torch.stack(one.queries, dim=2).cpu().numpy()  # [R, T, A, Hq, D]
        of_anchors = one.of_anchors.half().cpu().numpy()
        if not one.is_question:
            largest, mass = one.largest.half().cpu().numpy(), (one.mass / one.num_layers).cpu().numpy()
            by_layer = torch.stack(one.by_layer, dim=1).cpu().numpy() if one.by_layer else None  # [2, L, R, T, n]
        for row, (req_id, positions) in enumerate(zip(one.req_ids, one.positions, strict=True)):
            request = self._requests[req_id]
            for place, position in enumerate(positions):
                known = slice(position // self.settings.block_size + 1)
                own = queries[row, place], of_anchors[row, place, known]
                if one.is_question:
                    request.asked.append(own)
                    continue
                token = Token(
                    position=position,
                    queries=own[0],
                    of_anchors=own[1],
                    largest=largest[row, place, known],
                    mass=mass[row, place, known],
                    layer_mass=None if by_layer is None else by_layer[:, :, row, place, known],
                )
                request.tokens.append(token)
