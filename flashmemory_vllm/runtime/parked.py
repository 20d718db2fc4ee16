"""What is remembered of requests that lost their places, until they come back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashmemory_vllm.runtime.choice import ChoiceState


@dataclass(frozen=True, slots=True, eq=False)
class _Parked:
    """Float32 `[C, G, n]`, and how many of these blocks are known: by the device int32 `[1]`, and by the host."""

    memory: torch.Tensor
    known: torch.Tensor
    num_known: int


class ParkedMemories:
    """Takes memories from places and puts them back, on the current stream.

    Args:
        state: whose memory it is.
    """

    def __init__(self, state: ChoiceState) -> None:
        self._state = state
        self._parked: dict[str, _Parked] = {}

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._parked

    def num_known(self, req_id: str) -> int:
        """How many blocks are known of a request by the host's account; 0 if nothing was kept."""
        parked = self._parked.get(req_id)
        return 0 if parked is None else parked.num_known

    def park(self, req_id: str, place: int, num_blocks: int, num_known: int) -> None:
        """Keep what a request with so many full blocks leaves at a place."""
        memory, known = self._state.places.memory[:, :, place, :num_blocks], self._state.known[place : place + 1]
        self._parked[req_id] = _Parked(memory.clone(), known.clone(), num_known)

    def bring_back(self, req_id: str, place: int) -> None:
        """Put what was kept of a request, if anything, to its new place."""
        parked = self._parked.pop(req_id, None)
        if parked is not None:
            self._state.places.memory[:, :, place, : parked.memory.shape[2]] = parked.memory
            self._state.known[place : place + 1] = parked.known

    def forget(self, req_id: str) -> None:
        """Drop what was kept of a request, if anything."""
        self._parked.pop(req_id, None)
