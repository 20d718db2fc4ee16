"""Debugging: slots without an owner are NaN, so that a stray read shows."""

import numpy as np
import torch

from flashmemory_vllm.residency.plan import StepPlan
from flashmemory_vllm.residency.types import Copies, IntArray
from flashmemory_vllm.runtime.parts import RuntimeParts
from flashmemory_vllm.runtime.uploads import upload
from flashmemory_vllm.transfer.layout import POISON


def poisoned(parts: RuntimeParts) -> list[Copies]:
    """The slots that are about to be overwritten with NaN; the blocks beside them mean nothing."""
    if not parts.poison:
        return []
    free = [parts.planner.free_slots(group) for group in range(len(parts.groups))]
    return [Copies(group, slots, slots) for group, slots in enumerate(free)]


def poison_free_slots(parts: RuntimeParts, plan: StepPlan) -> None:
    """Overwrite every slot without an owner with NaN and clear the newly written ones.

    A block that is being written must not inherit NaN: kernels load whole pages and mask by weight zero.
    """
    for copies in poisoned(parts):
        free = _upload(parts, copies.slots)
        fresh = [_upload(parts, one.slots) for one in plan.fresh if one.group == copies.group]
        for layer in parts.groups[copies.group]:
            pages = parts.engine.layout.page_view(layer)
            pages[free] = POISON
            for slots in fresh:
                pages[slots] = 0


def _upload(parts: RuntimeParts, slots: IntArray) -> torch.Tensor:
    return upload(slots.astype(np.int64), parts.shape.device)
