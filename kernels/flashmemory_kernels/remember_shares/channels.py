"""Channels of a memory: what of a block's shares is kept, and how it fades."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch

Heads = Literal["max", "mean", "rms"]
OverTime = Literal["max", "sum", "rms"]


class Channel(NamedTuple):
    """One number for each block.

    Attributes:
        decay: factor on what is remembered, a token, in 0..1.
        heads: how the shares that the heads of a group pay with one query are combined: the largest, their mean, or
            the root of their mean square.
        over_time: how that is combined with what is remembered: the larger one, the sum, or the root of the mean
            square with weights that fade, `memory^2 = decay memory^2 + (1 - decay) share^2`.
    """

    decay: float
    heads: Heads = "max"
    over_time: OverTime = "max"


@dataclass(frozen=True, slots=True, eq=False)
class Channels:
    """Channels as the kernel reads them.

    Attributes:
        decays: float32 [C].
        modes: int32 [C], of each channel the numbers of its `heads` and, three times, its `over_time`.
    """

    decays: torch.Tensor
    modes: torch.Tensor

    @classmethod
    def of(cls, channels: Sequence[Channel], device: torch.device | str) -> Channels:
        """Put channels on a device.

        Raises:
            ValueError: there is none, or a decay is outside of 0..1.
        """
        if not channels:
            raise ValueError("channels: expected at least one channel, got none")
        for channel in channels:
            if not 0.0 <= channel.decay <= 1.0:
                raise ValueError(f"channels: expected decays in 0..1, got {channel.decay}")
        heads, over_time = get_args(Heads), get_args(OverTime)
        modes = [heads.index(channel.heads) + len(heads) * over_time.index(channel.over_time) for channel in channels]
        return cls(
            torch.tensor([channel.decay for channel in channels], dtype=torch.float32, device=device),
            torch.tensor(modes, dtype=torch.int32, device=device),
        )
