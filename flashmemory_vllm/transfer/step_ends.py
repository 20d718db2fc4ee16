"""The ends of the last steps, for copies into slots that their kernels read."""

from __future__ import annotations

from collections import deque

from flashmemory_vllm.transfer.engine import Marker, TransferEngine

# Of a slot that has rested for longer, the oldest end that is remembered is waited for. The host is never so far ahead
# of the device: that step is over.
NUM_ENDS = 4


class StepEnds:
    """Remembers where in the device's work each of the last steps ended.

    Args:
        engine: whose compute stream runs the steps.
    """

    def __init__(self, engine: TransferEngine) -> None:
        self._engine = engine
        self._ends: deque[Marker | None] = deque(maxlen=NUM_ENDS)

    def add(self) -> None:
        """A step ends here: all that reads its slots on the compute stream is enqueued."""
        self._ends.append(self._engine.marker())

    def before(self, rested: int) -> Marker | None:
        """What to wait for before slots are overwritten; None if no step has used them.

        Args:
            rested: steps between the newest one that uses the slots, and the one that is planned; see `Copies`.
        """
        return self._ends[-1 - min(rested, len(self._ends) - 1)] if self._ends else None
