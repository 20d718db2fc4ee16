"""Rows of a forward pass that is watched, and those of their tokens that go through its layers together."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch


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


class Part(NamedTuple):
    """Some tokens of a row: what leads from their positions to places in the batch, and the positions."""

    row: BatchRow
    offset: int
    positions: list[int]


@dataclass(slots=True, eq=False)
class Pass:
    """T tokens of each of R rows, which go through every layer together.

    Attributes:
        is_question: whether they are the newest of a prompt before its last: only anchor layers look at those.
        req_ids: requests of the rows.
        positions: their tokens' positions, R lists of T.
        places: int64 [R, T], where they lie in the batch.
        at: int64 [R, T], the positions on the device.
        slots: [R, n], pages of the rows, those of the longest in number.
        largest: float32 [R, T, n], largest share of any head of the layers so far.
        of_anchors: float32 [R, T, n], the same of anchor layers, of what goes to full blocks.
        mass: float32 [R, T, n], sum over the layers so far.
        num_layers: layers so far.
        queries: [R, T, Hq, D] of each anchor layer.
        by_layer: [2, R, T, n] of each layer, if asked for.
    """

    is_question: bool
    req_ids: list[str]
    positions: list[list[int]]
    places: torch.Tensor
    at: torch.Tensor
    slots: torch.Tensor
    largest: torch.Tensor
    of_anchors: torch.Tensor
    mass: torch.Tensor
    num_layers: int = 0
    queries: list[torch.Tensor] = field(default_factory=list)
    by_layer: list[torch.Tensor] = field(default_factory=list)
