"""Anchor layers are those that tell what will be attended to, whatever layer attends to it."""

import numpy as np

from flashmemory_vllm.capture.anchors import choose_anchors
from flashmemory_vllm.capture.document import Recording, Token

BLOCK_SIZE, BLOCKS, LAYERS, TOKENS = 16, 200, 6, 40


def make_recording(telling: dict[int, int], seed: int, tokens: int = TOKENS) -> Recording:
    """Layers look anywhere, but those of `telling`, each of which now looks at a block that will be paid much soon."""
    rng = np.random.default_rng(seed)
    found = []
    future = rng.integers(20, 150, (len(set(telling.values())) or 1, 60))
    for index in range(tokens):
        by_layer = rng.random((2, LAYERS, BLOCKS + 1)).astype(np.float16) * np.float16(0.5)
        for layer, which in telling.items():
            by_layer[1, layer, future[which, (index + 8) // 16]] = 0.9
        largest = (rng.random(BLOCKS + 1) * 0.3).astype(np.float16)
        largest[future[:, index // 16]] = 1.0
        position = (BLOCKS - 3) * BLOCK_SIZE + index
        found.append(
            Token(position, np.zeros((1, 1, 1), np.float16), largest, largest, np.zeros(1, np.float32), by_layer)
        )
    empty = np.zeros((0,), np.float16)
    return Recording(empty, empty, empty, found)


def test_layers_that_tell_are_found() -> None:
    recordings = [make_recording({4: 0, 1: 1}, seed) for seed in range(6)]
    assert choose_anchors(recordings, BLOCK_SIZE, 2) == (1, 4)


def test_a_layer_that_tells_the_same_adds_nothing() -> None:
    recordings = [make_recording({0: 0, 2: 0, 5: 1}, seed) for seed in range(6)]
    chosen = choose_anchors(recordings, BLOCK_SIZE, 2)
    assert chosen is not None
    assert 5 in chosen
    assert len({0, 2} & set(chosen)) == 1


def test_what_was_seen_some_tokens_ago_counts() -> None:
    """Layer 3 looks at the next block eight tokens ahead and then no more; layer 0 always does at what pays little."""
    recordings = [make_recording({}, seed) for seed in range(6)]
    for seed, recording in enumerate(recordings):
        rng, blocks = np.random.default_rng(seed), np.arange(20, 26)
        coming = rng.permutation(np.arange(30, 150))
        for index, token in enumerate(recording.tokens):
            assert token.layer_mass is not None
            token.layer_mass[:] *= np.float16(0.2)
            token.layer_mass[1, 0, blocks] = 0.9
            token.largest[20:150] = 0.0
            token.largest[blocks] = 0.1
            token.largest[coming[index // 16]] = 1.0
            if index % 16 == 8:
                token.layer_mass[1, 3, coming[index // 16 + 1]] = 0.9
    assert choose_anchors(recordings, BLOCK_SIZE, 1) == (3,)


def test_no_more_layers_than_there_are_and_nothing_of_short_texts() -> None:
    assert choose_anchors([make_recording({}, 0)], BLOCK_SIZE, 9) == tuple(range(LAYERS))
    assert choose_anchors([make_recording({}, 0, tokens=2)], BLOCK_SIZE) is None
