"""What a block is worth to its request: more than what the last token looked at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashmemory_vllm.residency.types import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class Worth:
    """How a block's worth follows from its scores, which are shares of attention: 0 or more.

    What one token looks at is stale some tokens later. What it looked at before, what stands behind that, and what
    lies in a slot already make better sets with fewer copies. Nothing of this is done by default.

    Attributes:
        memory_decay: what a score is still worth one token later; a block is remembered for the best of its scores.
        successor_share: what a block is worth at least, as a share of the worth of the block before it: text that is
            read goes on.
        hysteresis: how much more a block is worth that the request holds.
    """

    memory_decay: float = 0.0
    successor_share: float = 0.0
    hysteresis: float = 0.0

    def remember(self, scores: FloatArray, before: FloatArray | None, num_tokens: int) -> FloatArray:
        """Memory `[G, n]` after a selection.

        Args:
            scores: float32 `[G, n]` of the selection.
            before: float32 `[G, m]`, the memory that it finds. None if there is none.
            num_tokens: tokens since the selection before.
        """
        if before is None or not self.memory_decay:
            return scores
        memory = scores.copy()
        known = memory[:, : before.shape[1]]
        faded = before[:, : memory.shape[1]] * np.float32(self.memory_decay**num_tokens)
        np.maximum(known, faded, out=known)
        return memory

    def of(self, memory: FloatArray) -> FloatArray:
        """Worth `[G, n]` of blocks that are remembered so."""
        if not self.successor_share:
            return memory
        worth = memory.copy()
        np.maximum(memory[:, 1:], np.float32(self.successor_share) * memory[:, :-1], out=worth[:, 1:])
        return worth

    def preferring(self, held: IntArray, worth: FloatArray) -> FloatArray:
        """Worth `[n]` by position, with the bonus of what is held; blocks behind the end are newer than the scoring."""
        if not self.hysteresis:
            return worth
        preferred = worth.copy()
        preferred[held[: np.searchsorted(held, worth.size)]] *= np.float32(1 + self.hysteresis)
        return preferred
