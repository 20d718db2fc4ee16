"""Where each request has its tables on the device: a number that stays its own from its first step to its last."""

from collections.abc import Iterable

from flashmemory_vllm.errors import IntegrityError


class Places:
    """Gives out the numbers `[0, num_places)`. What the tenant before left at a place is still there.

    Args:
        num_places: P, most requests that have blocks at once.
    """

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._free = list(range(num_places))[::-1]
        self._of: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._of)

    def of(self, req_id: str) -> int:
        """The place of a request, taken when it is asked for first.

        Raises:
            IntegrityError: all are taken.
        """
        place = self._of.get(req_id)
        if place is None:
            if not self._free:
                raise IntegrityError(
                    f"request {req_id}: {self._num_places} others have blocks, no more run at once by --max-num-seqs"
                )
            place = self._of[req_id] = self._free.pop()
        return place

    def leave(self, req_ids: Iterable[str]) -> None:
        """Give up the places of requests that ended or were preempted; unknown ids are fine."""
        for req_id in req_ids:
            place = self._of.pop(req_id, None)
            if place is not None:
                self._free.append(place)

    def clear(self) -> None:
        """Give up all places."""
        self.leave(list(self._of))
