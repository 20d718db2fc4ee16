"""Rows that are due, put together by code that is not serving: evaluation, benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flashmemory_kernels.common.due_rows import Due, fill_first_tiles

from flashmemory_vllm.indexer.places import DueRows
from flashmemory_vllm.indexer.shares import TILE


@dataclass(frozen=True, slots=True)
class DueRequest:
    """One request.

    Attributes:
        place: where its tables and its memory are.
        num_blocks: its full blocks.
        position: of its newest query.
        num_queries: newest queries that its blocks are scored with. Default: 1.
        elapsed: tokens since its memory was last brought up to date. Default: 0.
        num_known: blocks that its memory knows. Default: 0.
        selections: that it had before. Default: 0.
        prompt_len: tokens of its prompt; 0 if nobody tells. Default: 0.
        req_id: vLLM's request id. Default: "".
    """

    place: int
    num_blocks: int
    position: int
    num_queries: int = 1
    elapsed: int = 0
    num_known: int = 0
    selections: int = 0
    prompt_len: int = 0
    req_id: str = ""


def due_rows(requests: Sequence[DueRequest], device: torch.device, *, is_entering: bool = False) -> DueRows:
    """The rows of requests, as serving makes them.

    Args:
        requests: in the order of the rows.
        device: where memories lie.
        is_entering: whether they have no set yet. Default: False.
    """
    fields = np.zeros((len(requests), len(Due)), np.int32)
    for request, row in zip(requests, fields, strict=True):
        row[[Due.PLACE, Due.POSITION, Due.NUM_QUERIES]] = request.place, request.position, request.num_queries
        row[[Due.ELAPSED, Due.NUM_KNOWN, Due.NUM_BLOCKS]] = request.elapsed, request.num_known, request.num_blocks
    fill_first_tiles(torch.from_numpy(fields), TILE)
    on_device = torch.from_numpy(fields.copy()).to(device)
    fields[:, Due.NUM_KNOWN] = -(fields[:, Due.NUM_KNOWN] > 0).astype(np.int32)
    told = np.array([[one.selections for one in requests], [one.prompt_len for one in requests]], np.int32)
    return DueRows(
        fields,
        on_device,
        tuple(request.req_id for request in requests),
        told[0],
        torch.from_numpy(told.copy()).to(device),
        is_entering,
    )
