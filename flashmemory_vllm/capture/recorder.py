"""Watches the forward passes of one worker, layer by layer, and keeps what its requests attended to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import torch

from flashmemory_vllm.capture.document import Recording, Token
from flashmemory_vllm.capture.labels import block_mass
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
    """What is known of a request: pooled keys [A, m, Hkv, 3, D] of some blocks each, queries of some tokens each."""

    keys: list[torch.Tensor] = field(default_factory=list)
    prompt_queries: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    tokens: list[Token] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Pass:
    """T recorded tokens of each of R rows, which go through every layer together.

    Attributes:
        req_ids: requests of the rows.
        positions: their tokens' positions, R lists of T.
        places: int64 [R, T], where they lie in the batch.
        at: int64 [R, T], the positions on the device.
        slots: [R, n], pages of the rows, those of the longest in number.
        largest: float32 [R, T, n], largest share of any head of the layers so far.
        mass: float32 [R, T, n], sum over the layers so far.
        num_layers: layers so far.
        queries: [R, T, Hq, D] of each anchor layer.
        by_layer: [2, R, T, n] of each layer, if asked for.
    """

    req_ids: list[str]
    positions: list[list[int]]
    places: torch.Tensor
    at: torch.Tensor
    slots: torch.Tensor
    largest: torch.Tensor
    mass: torch.Tensor
    num_layers: int = 0
    queries: list[torch.Tensor] = field(default_factory=list)
    by_layer: list[torch.Tensor] = field(default_factory=list)


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
        self._passes: list[_Pass] = []
        # Rows that hold some of their prompt's newest tokens but the last: request, and where they lie in the batch
        self._asking: list[tuple[str, slice]] = []
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
        size, window = self.settings.block_size, self.settings.choices.query_window
        full, recorded = [], []
        starts = accumulate((row.num_tokens for row in rows), initial=0)
        for row, start in zip(rows, starts, strict=False):
            if row.num_computed_tokens == 0:
                self._requests[row.req_id] = _Request()
            elif row.req_id not in self._requests:
                raise IntegrityError(f"request {row.req_id}: recording begins with its first token, not in its middle")
            offset = start - row.num_computed_tokens
            recorded += [(row, offset, some) for some in self._recorded(row)]
            first = max(row.num_computed_tokens, row.prompt_len - window)
            last = min(row.seq_len, row.prompt_len - 1)
            if first < last:
                self._asking.append((row.req_id, slice(first + offset, last + offset)))
            filled = row.slots[row.num_computed_tokens // size : row.seq_len // size]
            if len(filled):
                full.append(filled)
                self._filling.append((row.req_id, len(filled)))
        self._full = torch.cat(full) if full else None
        for _, alike in groupby(recorded, key=lambda one: len(one[2])):
            self._passes += self._make_passes(list(alike))

    def layer(self, layer: int, query: torch.Tensor) -> None:
        """A layer has written its keys and attended.

        Args:
            layer: attention layer index.
            query: [T, Hq, D] after RoPE.
        """
        is_anchor = layer in self.settings.anchor_layers
        for one in self._passes:
            self._look(one, layer, query[one.places], is_anchor=is_anchor)
        if is_anchor:
            for req_id, tokens in self._asking:
                self._requests[req_id].prompt_queries.setdefault(layer, []).append(query[tokens].half())
            if self._full is not None:
                pooled = pooled_keys(self._read_keys(layer, self._full), self.settings.choices.chunk_size)
                self._pooled.append(pooled.half())

    def end(self) -> None:
        """The forward pass is over.

        Raises:
            IntegrityError: layers are missing, as in a pass that was replayed from a graph.
        """
        for one in self._passes:
            if one.num_layers != self.settings.num_layers:
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
        first = request.tokens[0].queries
        asked = [torch.cat(parts) for parts in request.prompt_queries.values()]
        prompt_queries = torch.stack(asked, dim=1).cpu().numpy() if asked else first[None][:0]
        return Recording(torch.cat(request.keys, dim=1).numpy(), prompt_queries, request.tokens)

    def _clear(self) -> None:
        self._passes, self._asking, self._filling, self._full, self._pooled = [], [], [], None, []

    def _recorded(self, row: BatchRow) -> list[list[int]]:
        """Positions of a row's tokens to be recorded, in parts that one pass can take."""
        every = self.settings.choices.every
        first = max(row.num_computed_tokens, row.prompt_len - 1)
        first += -(first - row.prompt_len + 1) % every
        positions = list(range(first, row.seq_len, every))
        most = max(1, PASS_ELEMENTS // (row.seq_len * self.settings.num_query_heads))
        return [positions[at : at + most] for at in range(0, len(positions), most)]

    def _make_passes(self, alike: Sequence[tuple[BatchRow, int, list[int]]]) -> list[_Pass]:
        """Passes of rows with as many tokens each: row, what leads from positions to places in the batch, positions."""
        width = max(len(alike[0][2]) * self.settings.num_query_heads, self.settings.key_width)
        longest = max(row.seq_len for row, _, _ in alike)
        at_once = max(1, PASS_ELEMENTS // (longest * width))
        return [self._make_pass(alike[at : at + at_once]) for at in range(0, len(alike), at_once)]

    def _make_pass(self, alike: Sequence[tuple[BatchRow, int, list[int]]]) -> _Pass:
        device, positions = alike[0][0].slots.device, [some for _, _, some in alike]
        num_blocks = [-(-row.seq_len // self.settings.block_size) for row, _, _ in alike]
        at = torch.tensor(positions, device=device)
        slots = torch.stack([row.slots[: max(num_blocks)] for row, _, _ in alike])
        # Whatever the table holds behind a row's blocks: any page will do, its keys are later than the token
        is_own = torch.arange(slots.shape[1], device=device) < torch.tensor(num_blocks, device=device).unsqueeze(1)
        shape = (*at.shape, slots.shape[1])
        return _Pass(
            req_ids=[row.req_id for row, _, _ in alike],
            positions=positions,
            places=at + torch.tensor([offset for _, offset, _ in alike], device=device).unsqueeze(1),
            at=at,
            slots=slots.masked_fill(~is_own, 0),
            largest=torch.zeros(shape, device=device),
            mass=torch.zeros(shape, device=device),
        )

    def _look(self, one: _Pass, layer: int, queries: torch.Tensor, *, is_anchor: bool) -> None:
        """Add what a layer's queries [R, T, Hq, D] attend to."""
        keys = self._read_keys(layer, one.slots.flatten())
        by_row = keys.view(*one.slots.shape, *keys.shape[1:])
        shares = block_mass(queries, by_row, one.at, self.settings.softmax_scale)
        mass, largest = shares.mean(2), shares.amax(2)
        one.num_layers += 1
        one.mass += mass
        torch.maximum(one.largest, largest, out=one.largest)
        if self.settings.choices.layer_mass:
            one.by_layer.append(torch.stack((mass, largest)).half())
        if is_anchor:
            one.queries.append(queries.half())

    def _keep(self, one: _Pass) -> None:
        """Fetch what a pass has found, and give each token its part."""
        queries = torch.stack(one.queries, dim=2).cpu().numpy()  # [R, T, A, Hq, D]
        largest, mass = one.largest.half().cpu().numpy(), (one.mass / one.num_layers).cpu().numpy()
        by_layer = torch.stack(one.by_layer, dim=1).cpu().numpy() if one.by_layer else None  # [2, L, R, T, n]
        for row, (req_id, positions) in enumerate(zip(one.req_ids, one.positions, strict=True)):
            for place, position in enumerate(positions):
                num_blocks = position // self.settings.block_size + 1
                token = Token(
                    position=position,
                    queries=queries[row, place],
                    largest=largest[row, place, :num_blocks],
                    mass=mass[row, place, :num_blocks],
                    layer_mass=None if by_layer is None else by_layer[:, :, row, place, :num_blocks],
                )
                self._requests[req_id].tokens.append(token)
