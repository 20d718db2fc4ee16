"""What a block will be worth, from what it was worth to earlier tokens and what its content says: a small network."""

from __future__ import annotations

import math

import torch
from flashmemory_kernels.forecast_blocks import NEIGHBOURS, Head, Seen, forecast_logits, num_features
from torch import nn
from torch.nn import functional

HIDDEN = 32
# What a block was worth fades about so in a language model: the start
_START_DECAY = 0.9
# A weight of one on a feature is this much of what it is made of
_PER_LOG, _PER_LOGIT = 4.0, 4.0
_CONTENT_AT_START = 0.25


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
        features = num_features(len(decays))
        self.hidden = nn.Parameter(torch.empty(features, HIDDEN))
        self.hidden_bias = nn.Parameter(torch.empty(HIDDEN))
        self.out = nn.Parameter(torch.empty(HIDDEN))
        self.linear = nn.Parameter(torch.empty(features))
        self.bias = nn.Parameter(torch.empty(1))
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]))

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the hidden layer; start with what is remembered for some tokens and a part of the content's logit."""
        nn.init.normal_(self.hidden, std=1 / math.sqrt(len(self.hidden)), generator=generator)
        for weight in (self.hidden_bias, self.out, self.linear, self.bias):
            nn.init.zeros_(weight)
        nearest = min(range(len(self.decays)), key=lambda channel: abs(self.decays[channel] - _START_DECAY))
        with torch.no_grad():
            self.linear[len(self.decays) + nearest] = _PER_LOG
            self.linear[NEIGHBOURS * len(self.decays)] = _PER_LOGIT * _CONTENT_AT_START

    def weights(self) -> Head:
        """The weights as `forecast_blocks` takes them."""
        return Head(self.hidden, self.hidden_bias, self.out, self.linear, self.bias, self.calibration)

    def forward(self, seen: Seen) -> torch.Tensor:
        """Logits [..., M]."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            memory, newest, asked, distance = (part.float() for part in seen[:-1])
            return forecast_logits(Seen(memory, newest, asked, distance, seen.is_first), self.weights())


def with_neighbours(memory: torch.Tensor) -> torch.Tensor:
    """Memory [..., C, N] of all blocks as that of each and the two beside it, [..., N, 3, C]."""
    beside = functional.pad(memory, (1, 1))
    num_blocks = memory.shape[-1]
    return torch.stack([beside[..., at : at + num_blocks] for at in range(NEIGHBOURS)], dim=-1).transpose(-3, -2).mT
