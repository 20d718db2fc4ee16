"""What the planner has decided for a step."""

from __future__ import annotations

from dataclasses import dataclass

from flashmemory_vllm.residency.asked import Asked
from flashmemory_vllm.residency.batch import PlannedRows
from flashmemory_vllm.residency.types import Copies, WriteBacks


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """Everything one step does to the memory; filled by the planner, executed by the worker.

    Order of execution: recalls and prefetches, then the forward with its rows, then write-backs and the choice
    for `asked`. No slot that `recalls`, `prefetches` or `fresh` name is read by a row of this step as the block it held
    before; kernels and copies of earlier steps may still use it, and the executor orders itself after them.
    Most slots have rested for a step or more, so that their copies run beside the step before this one.

    Attributes:
        step: number of the step.
        evicted: slots that changed their owner or lost it to make room.
        fresh: per group with any, blocks that got a slot because this step writes their first tokens: nothing
            to copy.
        recalls: per group with any, host to slot, in place before this step's attention.
        prefetches: likewise, for later selections.
        write_backs: slot to host after the forward.
        rows: one for each scheduled request; those that decode can be read until the next step is planned.
        asked: rows that are chosen for after the forward.
        selected: requests that read what a selection has chosen, for the first time in this step.
    """

    step: int
    evicted: int
    fresh: tuple[Copies, ...]
    recalls: tuple[Copies, ...]
    prefetches: tuple[Copies, ...]
    write_backs: WriteBacks
    rows: PlannedRows
    asked: Asked
    selected: tuple[str, ...] = ()

    @property
    def may_stream(self) -> bool:
        """Whether a row attends to all its history, wherever that is.

        Follows from the scheduler's step alone: ranks of one model, whose slots may hold different blocks, agree.
        """
        return self.rows.has_prefill
