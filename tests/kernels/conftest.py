"""What tests of kernels share."""

from collections.abc import Iterator

import pytest

from tests.helpers.poisoned import poisoned_memory


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """A kernel that leaves a part of its result unwritten must not find zeros there by chance."""
    with poisoned_memory():
        yield
