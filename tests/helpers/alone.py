"""Selectors asked for one request after the other: what batches are compared with, and selectors that are so simple."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from flashmemory_kernels.common.due_rows import Due

from flashmemory_vllm.indexer import Selector
from flashmemory_vllm.indexer.due import DueRequest, due_rows
from flashmemory_vllm.indexer.places import DueRows, PlaceState


@dataclass(frozen=True, slots=True, eq=False)
class Alone:
    """One request that is due.

    Attributes:
        req_id: its id.
        block_ids: int64 [n], its full blocks.
        queries: [A, Hq, D], its newest query; None where nobody reads it.
        step_index: selections before.
        resident: bool [G, n], blocks of its set; None without one.
        earlier: [q, A, Hq, D], queries before the newest one, the newest of them first, where there is no set.
        prompt_len: tokens of its prompt.
    """

    req_id: str
    block_ids: torch.Tensor
    queries: torch.Tensor | None
    step_index: int = 0
    resident: torch.Tensor | None = None
    earlier: torch.Tensor | None = None
    prompt_len: int = 0


class OneByOne:
    """Has a selector remember one request at a time, a token after its last selection, in a memory of its own."""

    def __init__(self, selector: Selector) -> None:
        self.selector = selector
        self._memory: dict[str, torch.Tensor] = {}

    def score(self, request: Alone) -> torch.Tensor:
        """What the blocks are worth then, [G, n]."""
        geometry, kind, num_blocks = self.selector.geometry, self.selector.memory_kind, len(request.block_ids)
        memory = torch.full((len(kind.channels), geometry.num_groups, 1, num_blocks), torch.nan)
        is_entering = request.resident is None
        goes_on = request.step_index and (kind.outlives or not is_entering)
        before = self._memory.get(request.req_id) if goes_on else None
        num_known = 0 if before is None else min(num_blocks, before.shape[3])
        if before is not None:
            memory[..., :num_known] = before[..., :num_known]
        size = (len(geometry.anchor_layers), geometry.num_query_heads, geometry.head_dim)
        newest = torch.zeros(size) if request.queries is None else request.queries
        by_age = newest.unsqueeze(0) if request.earlier is None else torch.stack((newest, *request.earlier))
        in_set = torch.zeros(geometry.num_groups, 1, num_blocks, dtype=torch.int8)
        if request.resident is not None:
            in_set[:, 0] = request.resident
        state = PlaceState(
            by_age.flip(0).transpose(0, 1).unsqueeze(1).to(geometry.dtype),
            request.block_ids.int().unsqueeze(0),
            memory,
            in_set,
        )
        asked = DueRequest(
            0, num_blocks, len(by_age) - 1, len(by_age), int(num_known > 0), num_known, request.step_index,
            request.prompt_len, request.req_id,
        )  # fmt: skip
        self.selector.remember(due_rows([asked], geometry.device, is_entering=is_entering), state)
        self._memory[request.req_id] = memory
        worth = memory[kind.num_inner :, :, 0]
        weighed = worth * torch.tensor(kind.weights or (1.0,) * len(worth)).view(-1, 1, 1)
        return weighed.amax(0) if kind.combine == "max" else weighed.sum(0)

    def remembered(self, req_id: str) -> torch.Tensor:
        """What the last score of a request was made of, [C, G, n]."""
        return self._memory[req_id][:, :, 0]


class ScoringSelector(Selector):
    """A selector that is asked for one request after the other and says what its blocks are worth."""

    def remember(self, due: DueRows, state: PlaceState) -> None:
        for row, req_id in enumerate(due.req_ids):
            place, num_blocks = due.of_request(row)
            age = torch.arange(int(due.fields[row, Due.NUM_QUERIES]))
            newest = state.queries[:, place, (int(due.fields[row, Due.POSITION]) - age) % state.queries.shape[2]]
            newest = newest.transpose(0, 1)
            request = Alone(
                req_id,
                state.block_ids[place, :num_blocks].long(),
                newest[0],
                int(due.selections[row]),
                None if due.is_entering else state.in_set[:, place, :num_blocks].bool(),
                newest[1:] if due.is_entering and len(newest) > 1 else None,
                int(due.prompt_lens[row]),
            )
            state.memory[0, :, place, :num_blocks] = self.score(request)

    @abstractmethod
    def score(self, request: Alone) -> torch.Tensor:
        """Worth [G, n]."""
