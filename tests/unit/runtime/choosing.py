"""Requests that ask a choice queue for sets, and a plain twin of each, one request after the other."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from flashmemory_kernels.choose_sets import ChoicePolicy

from flashmemory_vllm.indexer import IndexGeometry, Selector
from flashmemory_vllm.residency.asked import Asked, AskedRow
from flashmemory_vllm.residency.lists import pairs_of
from flashmemory_vllm.runtime.choice import ChoiceSizes, ChoiceState
from flashmemory_vllm.runtime.choices import ChoiceQueue
from flashmemory_vllm.runtime.queries import QueryRing
from flashmemory_vllm.runtime.shape import AttentionShape
from flashmemory_vllm.runtime.side_stream import SideStream
from tests.helpers.alone import Alone, OneByOne

BLOCK, HQ, HKV, D, A = 8, 4, 2, 16, 3
PLACES, WIDTH, NUM_BLOCKS, LISTED = 4, 24, 90, 24
SINK, RECENT = 1, 1
MakeSelector = Callable[[IndexGeometry], Selector]


def make_geometry(layer_groups: tuple[int, ...] = (0, 0, 0), device: str = "cpu") -> IndexGeometry:
    return IndexGeometry(
        num_logical_blocks=NUM_BLOCKS,
        block_size=BLOCK,
        num_query_heads=HQ,
        num_kv_heads=HKV,
        head_dim=D,
        softmax_scale=0.5,
        anchor_layers=(1, 3, 4),
        layer_groups=layer_groups,
        num_groups=max(layer_groups) + 1,
        dtype=torch.float32,
        device=torch.device(device),
    )


@dataclass
class Request:
    """A request by its tokens; `sets` is what lists have made of its first one. A block that is begun joins them."""

    name: str
    place: int
    ids: list[int]
    prompt_len: int
    num_tokens: int
    want: int
    selections: int = 0
    is_new: bool = True
    sets: list[set[int]] = field(default_factory=list)
    worth: torch.Tensor | None = None
    twin_sets: list[set[int]] = field(default_factory=list)

    @property
    def num_full(self) -> int:
        return self.num_tokens // BLOCK

    @property
    def end(self) -> int:
        return -(-self.num_tokens // BLOCK)

    @property
    def candidates(self) -> range:
        return range(SINK, self.end - RECENT)

    @property
    def forced(self) -> set[int]:
        return set(range(SINK)) | set(range(self.end - RECENT, self.end))

    @property
    def chosen(self) -> list[set[int]]:
        return [own & set(self.candidates) for own in self.sets]


class World:
    """Keys and queries at random, which depend on position and request alone."""

    def __init__(
        self, make: MakeSelector, groups: tuple[int, ...] = (0, 0, 0), num_kept: int = 2, device: str = "cpu"
    ) -> None:
        self.geometry = make_geometry(groups, device)
        self.selector, self.twin = make(self.geometry), OneByOne(make(make_geometry(groups)))
        self.rng, self.generator = random.Random(0), torch.Generator().manual_seed(0)
        kind, num_groups = self.selector.memory_kind, self.geometry.num_groups
        self.num_kept = num_kept
        sizes = ChoiceSizes(len(kind.channels), num_groups, PLACES, WIDTH, PLACES, LISTED)
        shape = AttentionShape(("0",), HQ, HKV, D, 0.5, BLOCK, torch.float32, self.geometry.device)
        self.ring = QueryRing(A, PLACES, num_kept, shape)
        self.block_ids = torch.zeros(PLACES, WIDTH, dtype=torch.int32, device=device)
        threshold = self.selector.score_threshold or 0.0
        self.threshold = threshold
        policy = ChoicePolicy(kind.combine, threshold=threshold)
        self.state = ChoiceState(sizes, self.ring.by_place, self.block_ids, kind, policy)
        # What an earlier tenant left must not matter
        memory = self.state.places.memory
        memory.copy_(torch.rand(memory.shape, generator=self.generator))
        self.state.places.in_set.fill_(1)
        self.state.known.fill_(9)
        self.queue = ChoiceQueue(self.selector, self.state, SideStream(self.geometry.device))
        self.queue._known[:] = 9
        self.step = 0
        self.free = list(range(1, NUM_BLOCKS))
        self.rng.shuffle(self.free)
        self._queries: dict[tuple[str, int], torch.Tensor] = {}

    def start(self, name: str, place: int, prompt_len: int, want: int) -> Request:
        """A request whose prompt is computed."""
        ids = [self.free.pop() for _ in range(WIDTH)]
        request = Request(name, place, ids, prompt_len, 0, want)
        self.grow(request, prompt_len)
        return request

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Compute tokens; whether a block was begun by the last of them."""
        full = request.num_full
        for position in range(request.num_tokens, request.num_tokens + num_tokens):
            self.state.places.queries[:, request.place, position % self.num_kept] = self.query(request, position)
        for own in (*request.sets, *request.twin_sets):
            own.update(range(request.end, -(-(request.num_tokens + num_tokens) // BLOCK)))
        request.num_tokens += num_tokens
        filled = request.ids[full : request.num_full]
        self.block_ids[request.place, : request.end] = torch.tensor(request.ids[: request.end])
        if filled and self.selector.needs_keys:
            keys = torch.randn(A, len(filled), HKV, BLOCK, D, generator=self.generator)
            for selector in (self.selector, self.twin.selector):
                at = selector.geometry.device
                selector.add_blocks(torch.tensor(filled, device=at), list(keys.to(at)))
        return request.num_tokens % BLOCK == 1

    def query(self, request: Request, position: int) -> torch.Tensor:
        """Query [A, Hq, D] of a token."""
        key = (request.name, position)
        if key not in self._queries:
            self._queries[key] = torch.randn(A, HQ, D, generator=self.generator) * 2
        return self._queries[key]

    def asked(self, request: Request, *, scored: bool = True, cap: int = WIDTH, at_once: bool = False) -> AskedRow:
        """The row of a request."""
        return AskedRow(
            request.name, request.place, 100 + request.place, request.num_tokens, request.prompt_len,
            request.num_full, SINK, request.end - RECENT, request.end,
            request.want, cap, request.is_new, scored, at_once or request.is_new,
        )  # fmt: skip

    def earlier(self, request: Request, window: int) -> torch.Tensor:
        """Queries of the last tokens of a prompt, but for the request's newest token."""
        end = min(request.num_tokens - 1, request.prompt_len)
        return torch.stack([self.query(request, at) for at in range(request.prompt_len - window, end)])

    def together(self, *rows: AskedRow) -> Asked:
        """Rows as a step asks for them."""
        return Asked.of(rows, self.block_ids.cpu().numpy())

    def choose(self, *rows: AskedRow, requests: dict[str, Request], window: int = 1) -> None:
        """One step: choose, with the questions of new requests, and apply what comes of it to the sets."""
        self.step += 1
        earlier = {row.req_id: self.earlier(requests[row.req_id], window) for row in rows if row.is_new and window > 1}
        on_device = {req_id: queries.to(self.geometry.device) for req_id, queries in earlier.items()}
        self.queue.choose(self.step, self.together(*rows), on_device)
        by_place = {request.place: request for request in requests.values()}
        for chosen in (*self.queue.take(self.step + 1), *self.queue.take(self.step + 2)):
            assert (chosen.rows[:, :, 2] == self.step).all()
            for asked, of_row in zip(chosen.asked, chosen.rows, strict=True):
                request = by_place[asked.place]
                assert asked.req_id == request.name
                if asked.is_new:
                    request.sets, request.is_new = [set(request.forced) for _ in of_row], False
                for own, line in zip(request.sets, of_row, strict=True):
                    for place, come, go in zip(*pairs_of(line[None]), strict=True):
                        assert place == asked.place
                        assert come not in own
                        own.discard(int(go))
                        own.update({int(come)} - {-1})

    def device_sets(self, request: Request) -> list[set[int]]:
        """The sets on the device, without forced blocks."""
        of_groups = self.state.places.in_set[:, request.place]
        sets = [{int(at) for at in torch.nonzero(of_group)[:, 0]} for of_group in of_groups]
        for one in sets:
            assert set(range(SINK)) | set(range(request.end - RECENT, request.end)) <= one
            assert max(one) < request.end
        return [{at for at in one if at in request.candidates} for one in sets]

    def move(self, request: Request, place: int) -> None:
        """Preempt a request; it comes back at another place with its newest token."""
        self.queue.park(request.name, request.place, request.num_full)
        request.place, request.is_new, request.sets, request.twin_sets = place, True, [], []
        self.block_ids[place, : request.end] = torch.tensor(request.ids[: request.end])
        newest = request.num_tokens - 1
        self.state.places.queries[:, place, newest % self.num_kept] = self.query(request, newest)

    def question(self, request: Request, window: int) -> list[torch.Tensor]:
        """Queries of the last tokens of the prompt."""
        return [self.query(request, at) for at in range(request.prompt_len - window, request.prompt_len)]

    def twin_scored(self, request: Request, window: int = 1, newest: list[torch.Tensor] | None = None) -> None:
        """The twin's scores by the newest token, and by those before it where there is no set."""
        if newest is None:
            newest = [self.query(request, request.num_tokens - 1 - age) for age in range(window)]
        resident = None
        if request.twin_sets:
            resident = torch.zeros(self.geometry.num_groups, request.num_full, dtype=torch.bool)
            for mask, own in zip(resident, request.twin_sets, strict=True):
                mask[sorted(at for at in own if at < request.num_full)] = True
        ids = torch.tensor(request.ids[: request.num_full])
        request.worth = self.twin.score(
            Alone(
                request.name, ids, newest[0], request.selections, resident,
                torch.stack(newest[1:]) if len(newest) > 1 else None, request.prompt_len,
            )
        )  # fmt: skip
        request.selections += 1

    def twin_chosen(self, request: Request) -> None:
        """The best blocks by the scores that are known, anew."""
        request.twin_sets = [
            set(self._ranked(request, group, request.candidates)[: request.want]) | request.forced
            for group in range(self.geometry.num_groups)
        ]

    def twin_shrunk(self, request: Request) -> None:
        """Without those that are too many."""
        for group, own in enumerate(request.twin_sets):
            far = own & set(request.candidates)
            request.twin_sets[group] = set(self._ranked(request, group, far)[: request.want]) | request.forced

    def _ranked(self, request: Request, group: int, positions: set[int] | range) -> list[int]:
        assert request.worth is not None
        worth = request.worth[group].tolist()
        value = {at: worth[at] if at < len(worth) else float("inf") for at in positions}
        return sorted((at for at in positions if value[at] >= self.threshold), key=lambda at: (value[at], at))[::-1]
