"""What a block will be worth, from what it was worth to earlier tokens and what its content says: a small network."""

from __future__ import annotations

import math

import torch
from flashmemory_kernels.forecast_blocks import NEIGHBOURS, Head, Seen, forecast_logits, num_features
from torch import nn
from torch.nn import functional

HIDDEN = 32
# How what a block was worth fades in a language model, and how much of it does so: the start
MIX_DECAYS, MIX_WEIGHTS = (0.9, 0.98), (0.7, 0.3)
# How much more a block is worth that is held: a forecast that is hardly better is not worth a copy
HYSTERESIS = 1.0
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
    mix: torch.Tensor

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
        self.register_buffer("mix", mix_weights(decays))

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the hidden layer; start with the mix of what is remembered and a part of the content's logit."""
        nn.init.normal_(self.hidden, std=1 / math.sqrt(len(self.hidden)), generator=generator)
        for weight in (self.hidden_bias, self.out, self.linear, self.bias):
            nn.init.zeros_(weight)
        with torch.no_grad():
            self.linear[-1] = _PER_LOG
            self.linear[NEIGHBOURS * len(self.decays)] = _PER_LOGIT * _CONTENT_AT_START

    def weights(self) -> Head:
        """The weights as `forecast_blocks` takes them."""
        return Head(self.hidden, self.hidden_bias, self.out, self.linear, self.bias, self.calibration, self.mix)

    def forward(self, seen: Seen) -> torch.Tensor:
        """Logits [..., M]."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            memory, newest, asked, distance = (part.float() for part in seen[:-1])
            return forecast_logits(Seen(memory, newest, asked, distance, seen.is_first), self.weights())


def mix_weights(decays: tuple[float, ...]) -> torch.Tensor:
    """Weights [C] of channels of these decays in a mix without training: those of the ones that fade about so."""
    weights = torch.zeros(len(decays))
    for wanted, weight in zip(MIX_DECAYS, MIX_WEIGHTS, strict=True):
        weights[min(range(len(decays)), key=lambda channel: abs(decays[channel] - wanted))] += weight
    return weights


def with_neighbours(memory: torch.Tensor) -> torch.Tensor:
    """Memory [..., C, N] of all blocks as that of each and the two beside it, [..., N, 3, C]."""
    beside = functional.pad(memory, (1, 1))
    num_blocks = memory.shape[-1]
    return torch.stack([beside[..., at : at + num_blocks] for at in range(NEIGHBOURS)], dim=-1).transpose(-3, -2).mT
