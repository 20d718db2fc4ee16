"""What a block will be worth, from what it was worth to earlier tokens and what its content says: a small network."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

HIDDEN = 32
# Shares below this are all alike
_LEAST_SHARE = 1e-4
# Of a logarithm, so that features are of about one
_LOG_SCALE = 4.0
_LOGIT_SCALE = 4.0
_DISTANCE_SCALE = 8.0
# Tokens from the end within which distance tells most
_NEAR = 256.0
# The block before, the block itself, and the one behind it
NEIGHBOURS = 3
_NOT_REMEMBERED = 5
# What a block was worth fades about so in a language model: the start
_START_DECAY = 0.9
_CONTENT_AT_START = 0.25


class Seen(NamedTuple):
    """What is known of M blocks when a selection is made; leading dims are those of selections.

    Attributes:
        memory: float32 [..., M, 3, C], shares remembered of the block before, the block and the one behind it, 0 where
            there is none.
        newest: float32 [..., M], logits of the blocks' content by the newest queries.
        asked: float32 [..., M], the same by the question.
        distance: [..., M], tokens from the beginning of a block to the end of the last full one.
        is_first: bool, broadcasts with `newest`: whether the question is all that has been asked yet.
    """

    memory: torch.Tensor
    newest: torch.Tensor
    asked: torch.Tensor
    distance: torch.Tensor
    is_first: torch.Tensor


class ForecastHead(nn.Module):
    """Logit of a block from the history of the attention paid to it, and from its content.

    What heads looked at comes back, fades, and goes on in the next block; what they will look at anew only content
    tells. The features are logarithms of remembered shares, so that a factor is a difference, and the logits of the
    dual encoder. One hidden layer beside a linear part, in float32.

    Args:
        decays: of the channels of the memory, C of them, by the largest share of any head.
    """

    calibration: torch.Tensor

    def __init__(self, decays: tuple[float, ...]) -> None:
        super().__init__()
        self.decays = decays
        num_features = NEIGHBOURS * len(decays) + _NOT_REMEMBERED
        self.hidden = nn.Parameter(torch.empty(num_features, HIDDEN))
        self.hidden_bias = nn.Parameter(torch.empty(HIDDEN))
        self.out = nn.Parameter(torch.empty(HIDDEN))
        self.linear = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(1))
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]))

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the hidden layer; start with what is remembered for some tokens and a part of the content's logit."""
        nn.init.normal_(self.hidden, std=1 / math.sqrt(len(self.hidden)), generator=generator)
        for weight in (self.hidden_bias, self.out, self.linear, self.bias):
            nn.init.zeros_(weight)
        nearest = min(range(len(self.decays)), key=lambda channel: abs(self.decays[channel] - _START_DECAY))
        with torch.no_grad():
            self.linear[len(self.decays) + nearest] = _LOG_SCALE
            self.linear[NEIGHBOURS * len(self.decays)] = _LOGIT_SCALE * _CONTENT_AT_START

    def features(self, seen: Seen) -> torch.Tensor:
        """Features [..., M, 3 C + 5]."""
        remembered = (seen.memory + _LEAST_SHARE).log() / _LOG_SCALE + 1
        distance = seen.distance.clamp(min=1)
        others = (
            seen.newest / _LOGIT_SCALE,
            seen.asked / _LOGIT_SCALE,
            distance.log() / _DISTANCE_SCALE,
            _NEAR / (distance + _NEAR),
            seen.is_first.to(distance.dtype).expand_as(distance),
        )
        return torch.cat((remembered.flatten(-2), torch.stack(others, dim=-1)), dim=-1)

    def forward(self, seen: Seen) -> torch.Tensor:
        """Logits [..., M]."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            memory, newest, asked, distance = (part.float() for part in seen[:-1])
            features = self.features(Seen(memory, newest, asked, distance, seen.is_first))
            hidden = functional.silu(features @ self.hidden + self.hidden_bias)
            return hidden @ self.out + features @ self.linear + self.bias


def with_neighbours(memory: torch.Tensor) -> torch.Tensor:
    """Memory [..., C, N] of all blocks as that of each and the two beside it, [..., N, 3, C]."""
    beside = functional.pad(memory, (1, 1))
    num_blocks = memory.shape[-1]
    return torch.stack([beside[..., at : at + num_blocks] for at in range(NEIGHBOURS)], dim=-1).transpose(-3, -2).mT
