"""Which layers an indexer should read: those whose attention now tells what any layer will attend to next."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flashmemory_vllm.capture.document import Recording
from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.evaluation.worth import worth

NUM_ANCHORS = 3
# Tokens between two at which a selection is made up, and for which it is; until then from its query on
_EVERY, _STEPS, _DELAY = 16, 16, 2
_OPENING = 3

Floats = npt.NDArray[np.float32]


class _Case(NamedTuple):
    """One selection: [L, n] largest shares in each layer now, [n] what blocks are worth next, how many to choose."""

    seen: Floats
    worth: Floats
    budget: int


def choose_anchors(
    recordings: Sequence[Recording], block_size: int, count: int = NUM_ANCHORS
) -> tuple[int, ...] | None:
    """Layers whose largest shares, together, rank the blocks best that are worth most in the steps to come.

    Layers are added one by one, each time the one with which the blocks chosen within the budget are worth most, by the
    largest share that any head of any layer pays to each (`evaluation/worth.py`).

    Args:
        recordings: with the mass of each layer.
        block_size: tokens in a block.
        count: layers to choose, at most.

    Returns:
        Ascending layer indices; None if the recordings are too short to tell.
    """
    cases = [case for recording in recordings for case in _cases(recording, block_size)]
    if not cases:
        return None
    chosen: list[int] = []
    num_layers = len(cases[0].seen)
    for _ in range(min(count, num_layers)):
        left = [layer for layer in range(num_layers) if layer not in chosen]
        chosen.append(max(left, key=lambda layer: sum(_kept(case, [*chosen, layer]) for case in cases)))
    return tuple(sorted(chosen))


def _kept(case: _Case, layers: Sequence[int]) -> float:
    """Share of all worth that a selection by these layers keeps."""
    scores = case.seen[list(layers)].max(0)
    best = np.argpartition(-scores, case.budget - 1)[: case.budget]
    return float(case.worth[best].sum() / case.worth.sum())


def _cases(recording: Recording, block_size: int) -> Iterator[_Case]:
    options = FlashMemoryConfig()
    tokens = recording.tokens
    for at in sorted({*range(min(_OPENING, len(tokens))), *range(0, len(tokens), _EVERY)}):
        later = [token.largest for token in tokens[at + _DELAY : at + _DELAY + _STEPS]]
        own = tokens[at].layer_mass
        assert own is not None, "anchors are chosen from recordings with the mass of each layer"
        num_blocks = tokens[at].position // block_size
        kept = int(options.resident_ratio * num_blocks)
        sink, recent = options.sink_tokens // block_size, min(options.recent_tokens // block_size, max(2, kept // 4))
        free, budget = slice(sink, num_blocks - recent), kept - sink - recent
        if not later or not 0 < budget < num_blocks - sink - recent:
            continue
        shares = np.max([largest[:num_blocks][free] for largest in later], axis=0).astype(np.float32)
        if shares.any():
            yield _Case(own[1, :, :num_blocks][:, free].astype(np.float32), worth(shares), budget)
