"""Random prompts that every engine gets alike: each is the beginning of an endless stream of token ids."""

from collections.abc import Sequence

import numpy as np

SHARED_SHARE = 0.9
# Below these are the special tokens of most vocabularies
FIRST_TOKEN = 16
_SHARED_STREAM = 2**31


def make_prompts(lens: Sequence[int], vocabulary: int, streams: int) -> list[list[int]]:
    """Make distinct prompts. A longer prompt of the same stream and place begins as the shorter one does.

    Args:
        lens: tokens of each.
        vocabulary: number of token ids.
        streams: which family of streams; prompts of two families have nothing in common.

    Returns:
        Token ids of each prompt.
    """
    return [_draw(streams, place, length, vocabulary) for place, length in enumerate(lens)]


def make_sharing_prompts(lens: Sequence[int], vocabulary: int, streams: int) -> tuple[list[int], list[list[int]]]:
    """Make prompts whose first 90 % are the same, as far as the shortest goes.

    Args:
        lens: tokens of each.
        vocabulary: number of token ids.
        streams: which family of streams.

    Returns:
        The shared beginning, and token ids of each prompt.
    """
    shared = _draw(streams, _SHARED_STREAM, int(SHARED_SHARE * min(lens)), vocabulary)
    own = make_prompts([length - len(shared) for length in lens], vocabulary, streams)
    return shared, [shared + rest for rest in own]


def _draw(streams: int, place: int, length: int, vocabulary: int) -> list[int]:
    generator = np.random.default_rng([streams, place])
    first = min(FIRST_TOKEN, vocabulary - 1)
    ids: list[int] = generator.integers(first, vocabulary, size=length).tolist()
    return ids
