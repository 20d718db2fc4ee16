"""Words that every part of the transfers shares."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.integer]


class Marker(Protocol):
    """A place in the work of a device stream, as `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether the device has come past it."""

    def wait(self, stream: Any = None) -> None:  # noqa: ANN401 - torch's streams are untyped
        """Make the stream (default: the current one) wait for it; never blocks the host."""

    def synchronize(self) -> None:
        """Block the host until the device has come past it."""
