"""Specification and CPU path of `translate_slots`."""

import torch


def translate_slots_naive(slot_mapping: torch.Tensor, lut: torch.Tensor, block_size: int, out: torch.Tensor) -> None:
    """See `op.translate_slots`."""
    blocks = torch.div(slot_mapping, block_size, rounding_mode="floor").clamp_(min=0)
    offsets = slot_mapping - blocks * block_size
    translated = lut[:, blocks].long() * block_size + offsets
    target = out[:, : len(slot_mapping)]
    target.copy_(torch.where(slot_mapping < 0, slot_mapping, translated))
    slot_mapping.copy_(target[0])
