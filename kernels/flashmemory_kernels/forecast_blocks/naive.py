"""Specification and CPU path of `forecast_blocks`; a head is trained by its parts."""

from typing import NamedTuple

import torch

from flashmemory_kernels.common.due_rows import Due, scored_rows

# The block before, the block itself, and the one behind it
NEIGHBOURS = 3
# Channels behind those of shares: logits by the newest queries, by the question, and the result
NEWEST, ASKED, RESULT, NUM_OTHERS = 0, 1, 2, 3
# A logit that says that the question asked nothing of a block: those of the newest queries count in its place
NOT_ASKED = -1e30
# Shares below this are all alike
LEAST_SHARE = 1e-4
# Of logarithms, logits and logarithms of distances, so that features are of about one
LOG_SCALE, LOGIT_SCALE, DISTANCE_SCALE = 4.0, 4.0, 8.0
# Tokens from the end within which distance tells most
NEAR = 256.0
_OTHER_FEATURES = 6
# What a block hands on to the next one: text that is read goes on
SUCCESSOR = 0.5


class Head(NamedTuple):
    """A hidden layer beside a linear part, float32.

    Attributes:
        hidden: [F, H], F features of `num_features`.
        hidden_bias: [H].
        out: [H].
        linear: [F].
        bias: [1].
        calibration: [2], slope and offset that make a share to expect of a logit.
        mix: [C], weights of the channels in what a memory says without training.
    """

    hidden: torch.Tensor
    hidden_bias: torch.Tensor
    out: torch.Tensor
    linear: torch.Tensor
    bias: torch.Tensor
    calibration: torch.Tensor
    mix: torch.Tensor


class Seen(NamedTuple):
    """What is known of M blocks when a selection is made, float32; leading dims are those of selections.

    Attributes:
        memory: [..., M, 3, C], shares remembered of the block before, the block and the one behind it, 0 where there is
            none.
        newest: [..., M], logits of the blocks' content by the newest queries.
        asked: [..., M], the same by the question.
        distance: [..., M], tokens from the beginning of a block to the end of the last full one.
        is_first: bool, broadcasts with `newest`: whether the question is all that has been asked yet.
    """

    memory: torch.Tensor
    newest: torch.Tensor
    asked: torch.Tensor
    distance: torch.Tensor
    is_first: torch.Tensor


def num_features(num_channels: int) -> int:
    """Features F of a block whose memory has so many channels."""
    return NEIGHBOURS * num_channels + _OTHER_FEATURES


def mixed(memory: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """What a memory [..., 3, C] says of blocks [...]: its weighted channels, no less than half of the block before."""
    before, own, _ = (memory @ mix).unbind(-1)
    return torch.maximum(own, SUCCESSOR * before)


def forecast_features(seen: Seen, mix: torch.Tensor) -> torch.Tensor:
    """Features [..., M, F]: logarithms of shares, so that a factor is a difference, logits, and where a block lies."""
    remembered = _log(seen.memory)
    distance = seen.distance.clamp(min=1)
    others = (
        seen.newest / LOGIT_SCALE,
        seen.asked / LOGIT_SCALE,
        distance.log() / DISTANCE_SCALE,
        NEAR / (distance + NEAR),
        seen.is_first.to(distance.dtype).expand_as(distance),
        _log(mixed(seen.memory, mix)),
    )
    return torch.cat((remembered.flatten(-2), torch.stack(others, dim=-1)), dim=-1)


def _log(shares: torch.Tensor) -> torch.Tensor:
    return (shares + LEAST_SHARE).log() / LOG_SCALE + 1


def forecast_logits(seen: Seen, head: Head) -> torch.Tensor:
    """Logits [..., M]."""
    features = forecast_features(seen, head.mix)
    hidden = torch.nn.functional.silu(features @ head.hidden + head.hidden_bias)
    return hidden @ head.out + features @ head.linear + head.bias


def forecast_blocks_naive(memory: torch.Tensor, rows: torch.Tensor, head: Head, block_size: int) -> None:
    """See `op.forecast_blocks`."""
    num_channels = len(memory) - NUM_OTHERS
    for row in rows[scored_rows(rows)].tolist():
        place, num_blocks = row[Due.PLACE], row[Due.NUM_BLOCKS]
        own = memory[:, :, place, :num_blocks]  # [C + 3, G, n]
        padded = torch.nn.functional.pad(own[:num_channels], (1, 1))
        beside = torch.stack([padded[..., at : at + num_blocks] for at in range(NEIGHBOURS)], dim=-1)
        newest, asked, result = own[num_channels:]
        distance = torch.arange(num_blocks, 0, -1, device=memory.device) * float(block_size)
        seen = Seen(
            beside.permute(1, 2, 3, 0),
            newest,
            torch.where(asked <= NOT_ASKED, newest, asked),
            distance.expand_as(newest),
            torch.tensor(row[Due.NUM_KNOWN] == 0, device=memory.device),
        )
        slope, offset = head.calibration
        result.copy_(torch.addcmul(offset, slope, forecast_logits(seen, head)).sigmoid().nan_to_num(nan=0.0))
