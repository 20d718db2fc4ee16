"""Conservation laws of the slots of one layer group."""

from __future__ import annotations

import numpy as np

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.slot_arrays import NO_OWNER, NOT_RESIDENT, NULL_BLOCK, NULL_SLOT, SlotArrays
from flashmemory_vllm.residency.types import IntArray


def check_group(group: int, slots: SlotArrays, idle: IntArray) -> None:
    """Check what is known of a group's slots.

    Args:
        group: layer group.
        slots: its arrays.
        idle: int32 `[n]` slots that are queued.

    Raises:
        IntegrityError: with the numbers that do not add up.
    """
    lut, owner, pins = slots.lut, slots.owner, slots.pins
    used, is_idle = np.flatnonzero(owner != NO_OWNER), np.zeros(owner.size, np.bool_)
    if used.size != slots.counts[0]:
        raise IntegrityError(f"group {group}: {used.size} slots are used, {slots.counts[0]} are counted")
    if owner[NULL_SLOT] != NO_OWNER or lut[NULL_BLOCK] != NULL_SLOT:
        raise IntegrityError(f"group {group}: null slot owned by {owner[NULL_SLOT]}, null block in {lut[NULL_BLOCK]}")
    resident = np.flatnonzero(lut[1:] != NOT_RESIDENT) + 1
    if resident.size != used.size or (owner[lut[resident]] != resident).any():
        raise IntegrityError(
            f"group {group}: {resident.size} resident blocks and {used.size} owned slots are not each other's inverse"
        )
    if pins.min() < 0 or pins[owner == NO_OWNER].any():
        raise IntegrityError(f"group {group}: a pin count is negative, or a slot without a block is pinned")
    is_idle[idle] = True
    if np.unique(idle).size != idle.size or (is_idle[1:] == (pins[1:] > 0)).any() or is_idle[NULL_SLOT]:
        raise IntegrityError(f"group {group}: {idle.size} slots are queued, but not each that has no pin once")
    num_pinned = np.count_nonzero(pins)
    if num_pinned != slots.counts[1]:
        raise IntegrityError(f"group {group}: {num_pinned} slots are pinned, {slots.counts[1]} are counted")
    loose = ~slots.host_valid[owner[used]] & (pins[used] == 0)
    if loose.any():
        raise IntegrityError(f"group {group}: blocks {owner[used[loose]]} have no host copy and are not pinned")
