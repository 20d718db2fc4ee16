"""Which layers an indexer should read: those whose attention so far tells what any layer will attend to next."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from flashmemory_vllm.capture.document import Recording
from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.evaluation.history import mixed, replay
from flashmemory_vllm.indexer.forecast_model import MIX_DECAYS

NUM_ANCHORS = 3
# Tokens between two at which a selection is made up, and for which it is; until then from its query on
_EVERY, _STEPS, _DELAY = 16, 16, 2
_OPENING = 3


class _Case(NamedTuple):
    """One selection: [2, L, n] what each layer remembers, [n] what is lost without a block, how many to choose."""

    seen: torch.Tensor
    paid: torch.Tensor
    budget: int


def choose_anchors(
    recordings: Sequence[Recording], block_size: int, count: int = NUM_ANCHORS
) -> tuple[int, ...] | None:
    """Layers whose memories, together, leave out least of what any layer will attend to.

    Layers are added one by one, each time the one with which the blocks chosen within the budget have most of the
    squares of the largest shares that any head of any layer pays in the steps to come. Blocks are chosen as serving
    does without training, by what they are remembered for (`evaluation/history.py`): layers whose newest shares tell
    most may tell little of what comes back. All steps count as they are: by the largest shares in a window, in relation
    to what a selection could have, layers look alike of which one loses half more than the other.

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
    num_layers = cases[0].seen.shape[1]
    for _ in range(min(count, num_layers)):
        left = [layer for layer in range(num_layers) if layer not in chosen]
        chosen.append(max(left, key=lambda layer: sum(_kept(case, [*chosen, layer]) for case in cases)))
    return tuple(sorted(chosen))


def _kept(case: _Case, layers: Sequence[int]) -> float:
    """What a selection by these layers keeps."""
    best = mixed(case.seen[:, list(layers)].amax(1)).topk(case.budget).indices
    return float(case.paid[best].sum())


def _cases(recording: Recording, block_size: int) -> Iterator[_Case]:
    options = FlashMemoryConfig()
    tokens, memory = recording.tokens, _memory(recording)
    for at in sorted({*range(min(_OPENING, len(tokens))), *range(0, len(tokens), _EVERY)}):
        later = [token.largest for token in tokens[at + _DELAY : at + _DELAY + _STEPS]]
        num_blocks = tokens[at].position // block_size
        kept = int(options.resident_ratio * num_blocks)
        sink, recent = options.sink_tokens // block_size, min(options.recent_tokens // block_size, max(2, kept // 4))
        free, budget = slice(sink, num_blocks - recent), kept - sink - recent
        if not later or not 0 < budget < num_blocks - sink - recent:
            continue
        paid = np.mean([largest[:num_blocks][free].astype(np.float32) ** 2 for largest in later], axis=0)
        if paid.any():
            yield _Case(memory[at, :, :, :num_blocks][:, :, free], torch.from_numpy(paid), budget)


def _memory(recording: Recording) -> torch.Tensor:
    """What each layer remembers after each token, float32 [T, 2, L, n]."""
    largest = []
    for token in recording.tokens:
        assert token.layer_mass is not None, "anchors are chosen from recordings with the mass of each layer"
        largest.append(token.layer_mass[1])
    num_layers, width = len(largest[0]), max(one.shape[1] for one in largest)
    shares = np.stack([np.pad(one, ((0, 0), (0, width - one.shape[1]))) for one in largest])
    positions = np.asarray([token.position for token in recording.tokens], np.int64)
    memory = replay(torch.from_numpy(shares.reshape(len(shares), -1)), positions, MIX_DECAYS)
    return memory.view(len(shares), len(MIX_DECAYS), num_layers, width)
