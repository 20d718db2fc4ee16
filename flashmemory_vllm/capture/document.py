"""One recorded document, and its tensors as they lie in a shard."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from flashmemory_vllm.capture.prompts import Prompt
from flashmemory_vllm.errors import IntegrityError

Array: TypeAlias = npt.NDArray[np.generic]
Half: TypeAlias = npt.NDArray[np.float16]
# Blocks with less of the attention mass, and those that no head pays so much of its attention to, are left out.
LEAST_MASS = 1e-4
LEAST_SHARE = 1e-2


@dataclass(frozen=True, slots=True, eq=False)
class Token:
    """What one recorded token looked at.

    Attributes:
        position: index of the token in its document.
        queries: float16 [A, Hq, D] after RoPE, of the anchor layers.
        largest: float16 [n], largest share of each block in the attention of any head of any layer.
        of_anchors: float16 [n], the same of anchor layers alone, of what goes to full blocks.
        mass: float32 [n], share of each block, mean over all layers and heads.
        layer_mass: float16 [2, L, n], mean and maximum over the heads of each layer; None if not asked for.
    """

    position: int
    queries: Half
    largest: Half
    of_anchors: Half
    mass: npt.NDArray[np.float32]
    layer_mass: Half | None


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """What was seen of one request.

    Attributes:
        keys: float16 [A, n, Hkv, 3, D], pooled keys of the chunks of its full blocks.
        prompt_queries: float16 [Q, A, Hq, D] after RoPE, of the newest prompt tokens before the last one, in order.
        prompt_shares: float16 [Q, n], `of_anchors` of the same tokens.
        tokens: the recorded tokens in order.
    """

    keys: Half
    prompt_queries: Half
    prompt_shares: Half
    tokens: Sequence[Token]


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A prompt, the model's answer and the recording of it.

    A recorded token is one whose forward pass wrote an output token: the last of the prompt, and every output but
    the last. With `every` above 1, every such one of them.

    Attributes:
        prompt: what was asked.
        output_ids: the answer, the stop token included.
        recording: what attention looked at.
        every: output tokens from one recorded token to the next.
    """

    prompt: Prompt
    output_ids: Sequence[int]
    recording: Recording
    every: int

    def tensors(self, block_size: int) -> dict[str, Array]:
        """The document's tensors by name, without a prefix.

        Args:
            block_size: tokens in a block.

        Raises:
            IntegrityError: a recorded number does not fit into float16.
        """
        # A batch that is scheduled ahead may go one token beyond a stop token.
        num_tokens = -(-len(self.output_ids) // self.every)
        tokens = list(self.recording.tokens[:num_tokens])
        # Blocks that are still being written are no candidates.
        shared = [
            np.flatnonzero(token.largest[: token.position // block_size] >= LEAST_SHARE).astype(np.int32)
            for token in tokens
        ]
        massive = [np.flatnonzero(token.mass > LEAST_MASS).astype(np.int32) for token in tokens]
        found: dict[str, Array] = {
            "keys": self.recording.keys,
            "prompt_queries": self.recording.prompt_queries,
            "queries": np.stack([token.queries for token in tokens]),
            "anchor_share": padded_rows([*self.recording.prompt_shares, *(token.of_anchors for token in tokens)]),
            "positions": np.asarray([token.position for token in tokens], np.int32),
            "share_ptr": _pointers(shared),
            "share_ids": np.concatenate(shared),
            "share": np.concatenate([token.largest[ids] for token, ids in zip(tokens, shared, strict=True)]),
            "mass_ptr": _pointers(massive),
            "mass_ids": np.concatenate(massive),
            "mass": np.concatenate([token.mass[ids] for token, ids in zip(tokens, massive, strict=True)]).astype(
                np.float16
            ),
            "group": np.asarray([self.prompt.group], np.int32),
            "answer": np.asarray(self._answer(len(tokens)), np.int32),
            "digest": np.frombuffer(self.prompt.digest, np.uint8),
            "outputs": np.asarray(self.output_ids, np.int32),
        }
        by_layer = [token.layer_mass for token in tokens if token.layer_mass is not None]
        if by_layer:
            found["layer_mass"] = _pad_blocks(by_layer)
        for name in ("keys", "prompt_queries", "queries"):
            half: Half = found[name].astype(np.float16, copy=False)
            if not np.isfinite(half).all():
                raise IntegrityError(f"capture: {name} of the model are beyond float16 (65504), or not finite")
        return found

    def _answer(self, num_recorded: int) -> tuple[int, int]:
        """First and last recorded token that writes the answer, -1 if there is none."""
        if self.prompt.answer is None:
            return -1, -1
        first, last = -(-self.prompt.answer[0] // self.every), self.prompt.answer[1] // self.every
        last = min(last, num_recorded - 1)
        return (first, last) if first <= last else (-1, -1)


def with_prefix(index: int, tensors: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """Names as in a shard in which the document is the one of this index."""
    return ((f"doc{index}.{name}", tensor) for name, tensor in tensors.items())


def _pointers(rows: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    return np.cumsum([0, *map(len, rows)]).astype(np.int32)


def padded_rows(rows: Sequence[Half]) -> Half:
    """[T, N] of rows [n]: blocks that a token has not seen have nothing."""
    width = max(map(len, rows))
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])


def _pad_blocks(rows: Sequence[Half]) -> Half:
    """[2, T, L, N] of rows [2, L, n]: blocks that a token has not seen have no mass."""
    width = max(row.shape[2] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, 0), (0, width - row.shape[2]))) for row in rows]
    return np.stack(padded, axis=1)
