"""Random documents with the sizes of a small model."""

import numpy as np

from flashmemory_vllm.capture.document import Document, Recording, Token
from flashmemory_vllm.capture.prompts import Prompt
from flashmemory_vllm.capture.writer import CaptureMeta, ModelShape

BLOCK_SIZE, CHUNK_SIZE, NUM_LAYERS = 4, 2, 3
SHAPE = ModelShape(NUM_LAYERS, 4, 2, 8, BLOCK_SIZE, (0, 2), 0.5, "float32")


def make_meta(**provenance: object) -> CaptureMeta:
    return CaptureMeta("m", "llama", SHAPE, CHUNK_SIZE, 3, 16, 1, {"prompts": "p", "every": 1, **provenance})


def make_document(
    number: int,
    prompt_len: int = 10,
    num_outputs: int = 5,
    every: int = 1,
    answer: tuple[int, int] | None = None,
    *,
    num_recorded: int | None = None,
) -> Document:
    """A document; as many tokens recorded as there are outputs, unless `num_recorded` says."""
    rng = np.random.default_rng(number)
    recorded = -(-num_outputs // every) if num_recorded is None else num_recorded
    tokens = [_token(rng, prompt_len - 1 + every * index) for index in range(recorded)]
    num_chunks = (prompt_len + num_outputs - 1) // BLOCK_SIZE * (BLOCK_SIZE // CHUNK_SIZE)
    keys = rng.normal(size=(2, num_chunks, 2, 3, 8)).astype(np.float16)
    prompt_queries = rng.normal(size=(2, 2, 4, 8)).astype(np.float16)
    prompt_shares = rng.random((2, 4)).astype(np.float16)
    ids = tuple(int(token) for token in rng.integers(0, 100, prompt_len))
    outputs = [int(token) for token in rng.integers(0, 100, num_outputs)]
    recording = Recording(keys, prompt_queries, prompt_shares, tokens)
    return Document(Prompt(ids, num_outputs, number, answer), outputs, recording, every)


def _token(rng: np.random.Generator, position: int) -> Token:
    num_blocks = position // BLOCK_SIZE + 1
    return Token(
        position=position,
        queries=rng.normal(size=(2, 4, 8)).astype(np.float16),
        largest=(rng.random(num_blocks) ** 9).astype(np.float16),
        of_anchors=rng.random(num_blocks).astype(np.float16),
        mass=rng.dirichlet(np.full(num_blocks, 0.1)).astype(np.float32),
        layer_mass=rng.random((2, NUM_LAYERS, num_blocks)).astype(np.float16),
    )
