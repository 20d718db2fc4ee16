"""Stands before a selector: what goes wrong in it costs selections, never the engine.

A request whose selection fails goes on with the blocks it holds; one that has never been selected for takes those
that have slots. The text may then be worse, as with a bad selector, but nobody else is touched.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.indexer.base import Selector
from flashmemory_vllm.indexer.places import DueRows, PlaceState
from flashmemory_vllm.residency.types import IntArray

# Below vLLM's logger, which alone has handlers.
logger = logging.getLogger("vllm.flashmemory")

EXCEPTION, NOT_FINITE, NOT_INDEXED = "exception", "not_finite", "not_indexed"
REASONS = (EXCEPTION, NOT_FINITE, NOT_INDEXED)

Result = TypeVar("Result")


class SelectorGuard:
    """Catches what a selector raises, and counts what it does wrong.

    A device fault and a broken conservation law are passed on: after them nothing can be trusted.

    Args:
        selector: the one that is guarded.

    Attributes:
        failures: selections that failed, by reason.
    """

    def __init__(self, selector: Selector) -> None:
        self._selector = selector
        self.failures = dict.fromkeys(REASONS, 0)
        self._is_strict = False
        self._told: set[str] = set()
        # Blocks whose index keys are an earlier block's, because making theirs failed
        self._lacks_keys = np.zeros(selector.geometry.num_logical_blocks, np.bool_)
        self._lacks_some = False

    @contextmanager
    def strict(self) -> Iterator[None]:
        """Inside, whatever the selector raises is passed on: before a server is up it is better refused."""
        self._is_strict = True
        try:
            yield
        finally:
            self._is_strict = False

    def add_blocks(
        self,
        blocks: IntArray,
        block_ids: torch.Tensor,
        keys: Sequence[torch.Tensor],
        slots: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """As the selector's.

        Args:
            blocks: int32 [n] on the host.
            block_ids: int64 [n], the same on the index device.
            keys: per anchor layer, see `Selector.add_blocks`.
            slots: likewise.
        """

        def work() -> bool:
            self._selector.add_blocks(block_ids, keys, slots)
            return True

        is_lost = self._attempt("making index keys", work) is None
        if is_lost or self._lacks_some:
            self._lacks_keys[blocks] = is_lost
            self._lacks_some = bool(self._lacks_keys.any())

    def forget(self, req_id: str) -> None:
        """As the selector's."""
        self._attempt("forgetting a request", lambda: self._selector.forget(req_id))

    @property
    def lacks_some(self) -> bool:
        """Whether any block has no index keys that the selector needs."""
        return self._selector.needs_keys and self._lacks_some

    def lacks_keys(self, blocks: IntArray) -> bool:
        """Whether one of the blocks, int32 [n], has no index keys that the selector needs; counts it."""
        lacks = self.lacks_some and bool(self._lacks_keys[blocks].any())
        self.failures[NOT_INDEXED] += lacks
        return lacks

    def remember(self, due: DueRows, state: PlaceState) -> bool:
        """As the selector's; whether it did so."""

        def work() -> bool:
            self._selector.remember(due, state)
            return True

        done = self._attempt("scoring", work)
        if done is None:
            self.failures[EXCEPTION] += len(due)
        return bool(done)

    def note_not_finite(self, count: int) -> None:
        """So many requests were given numbers that are none."""
        if count:
            self.failures[NOT_FINITE] += count
            self._tell(NOT_FINITE, "gave numbers that are NaN or infinite, allowed are finite ones", exc_info=False)

    def _attempt(self, what: str, call: Callable[[], Result]) -> Result | None:
        if self._is_strict:
            return call()
        try:
            return call()
        except (torch.AcceleratorError, IntegrityError):
            raise
        except Exception:  # noqa: BLE001 - a selector may raise anything
            self._tell(what, f"raised while {what}", exc_info=True)
            return None

    def _tell(self, kind: str, what: str, *, exc_info: bool) -> None:
        """Once for each kind: a selector that fails may fail at every step."""
        if kind not in self._told:
            self._told.add(kind)
            logger.error(
                "flashmemory: selector %s %s. Requests go on with the blocks they hold; "
                "flashmemory:failed_selections_total counts from here on",
                self._selector.name, what, exc_info=exc_info,
            )  # fmt: skip
