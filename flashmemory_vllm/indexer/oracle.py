"""Selector `oracle`: the best set there could be, because it knows what dense attention will look at.

For evaluation only: it tells how much of a selector's loss is the selector's own, and how much comes from one set
for all layers of a group and for tau steps. It reads what a dense run of the same prompts recorded before
(`flashmemory capture --layer-mass`), and cannot be made unless code has put such a recording into place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, get_args

import numpy as np
import numpy.typing as npt
import torch
from flashmemory_kernels.common import Aggregate
from safetensors import safe_open

from flashmemory_vllm.errors import ConfigError, IntegrityError
from flashmemory_vllm.indexer.base import IndexGeometry, Selector
from flashmemory_vllm.indexer.places import DueRows, PlaceState
from flashmemory_vllm.residency.budget import STEPS_TO_FORCE

# The request that a runtime warms its kernels up with
_NO_REQUEST = ""


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What dense attention looked at in one document.

    Attributes:
        first_position: index of the first recorded token, the last of the prompt; the others follow one by one.
        mass: float16 [2, T, L, n], share of each block: mean and maximum over the heads of each layer.
    """

    first_position: int
    mass: npt.NDArray[np.float16]


class Future:
    """Recorded documents by the digest of their prompts, and how far the requests that repeat them have come.

    Args:
        block_size: tokens in a block of the recorded model.
        documents: by digest the shard that holds one, and its place there.
    """

    def __init__(self, block_size: int, documents: Mapping[bytes, tuple[Path, int]]) -> None:
        self.block_size = block_size
        self._documents = documents
        self._digests: dict[str, bytes] = {}
        self._num_tokens: dict[str, int] = {}
        self._traces: dict[str, Trace] = {}

    @classmethod
    def load(cls, folder: Path) -> Future:
        """Find the documents of a capture; they are read when they are asked for.

        Args:
            folder: what `flashmemory capture --layer-mass` wrote.

        Raises:
            ConfigError: it holds no complete capture, or one without the mass of each layer and each token.
        """
        if not (folder / "index.json").is_file():
            raise ConfigError(f"oracle: {folder} is given, allowed is the folder of a complete capture")
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        recorded = meta["provenance"]
        if not recorded.get("layer_mass") or recorded.get("every") != 1:
            raise ConfigError(f"oracle: {folder} is given, allowed is a capture with --layer-mass and --every 1")
        documents = {}
        for path in sorted(folder.glob("shard-*.safetensors")):
            with safe_open(path, framework="numpy") as shard:
                for index in range(int(shard.metadata()["documents"])):
                    documents[shard.get_tensor(f"doc{index}.digest").tobytes()] = (path, index)
        return cls(int(meta["block_size"]), documents)

    def name(self, req_id: str, digest: bytes) -> None:
        """Say which prompt a request repeats.

        Raises:
            ConfigError: it was not recorded.
        """
        if digest not in self._documents:
            raise ConfigError(
                f"oracle: the prompt of request {req_id} was not recorded; allowed are the {len(self._documents)} "
                "prompts of the capture"
            )
        self._digests[req_id] = digest

    def advance(self, req_id: str, num_tokens: int) -> None:
        """Say how many tokens of a request have keys after the step that begins."""
        self._num_tokens[req_id] = num_tokens

    def trace(self, req_id: str) -> tuple[Trace, int]:
        """A request's recording, and the place in it of the token that was computed last.

        Raises:
            IntegrityError: nobody has said what the request is, or how far it has come.
        """
        if req_id not in self._digests or req_id not in self._num_tokens:
            raise IntegrityError(f"oracle: request {req_id} is unknown; it can score what OracleGenerator asks only")
        if req_id not in self._traces:
            path, index = self._documents[self._digests[req_id]]
            with safe_open(path, framework="numpy") as shard:
                first = int(shard.get_tensor(f"doc{index}.positions")[0])
                self._traces[req_id] = Trace(first, shard.get_tensor(f"doc{index}.layer_mass"))
        trace = self._traces[req_id]
        return trace, self._num_tokens[req_id] - 1 - trace.first_position

    def forget(self, req_id: str) -> None:
        """Drop a request's recording from memory; a preempted one comes back under its name and reads it again."""
        self._traces.pop(req_id, None)


class OracleSelector(Selector):
    """Scores a block by the attention that it will get, had all blocks stayed, while the selection is in force.

    A selection after token t serves the tokens from t + 1 + delay to t + tau + delay; the first one, which is not
    delayed, those before as well. Once the text departs from the recorded one, this is the future of another text.

    Args:
        geometry: sizes.
        aggregate: "mean" of the shares over window, layers of the group and heads, or "max". Default: "max".
        tau_steps: decode steps between two selections. Default: 16.

    Attributes:
        future: put into place by code that evaluates; None everywhere else.

    Raises:
        ConfigError: there is no future, or it has other blocks; or `aggregate` is unknown.
    """

    name: ClassVar[str] = "oracle"
    needs_queries: ClassVar[bool] = False
    needs_keys: ClassVar[bool] = False
    future: ClassVar[Future | None] = None

    def __init__(
        self,
        geometry: IndexGeometry,
        aggregate: Aggregate = "max",
        tau_steps: int = 16,
    ) -> None:
        super().__init__(geometry)
        if self.future is None:
            raise ConfigError(
                "flashmemory.selector: oracle is given, which knows nothing but recorded prompts and is there for "
                "evaluation only; allowed when serving is any other"
            )
        if self.future.block_size != geometry.block_size:
            raise ConfigError(
                f"oracle: recorded in blocks of {self.future.block_size} tokens, --block-size is {geometry.block_size}"
            )
        if aggregate not in get_args(Aggregate):
            raise ConfigError(f"aggregate must be one of {', '.join(get_args(Aggregate))}; got {aggregate!r}")
        self._future = self.future
        self._aggregate = aggregate
        self._tau, self._delay = tau_steps, STEPS_TO_FORCE - 1

    def remember(self, due: DueRows, state: PlaceState) -> None:
        """The share of each block in the attention to come; the host looks it up for one request after the other.

        Raises:
            IntegrityError: nobody has said which prompt a request repeats.
        """
        num_groups = self.geometry.num_groups
        for row, req_id in enumerate(due.req_ids):
            place, num_blocks = due.of_request(row)
            scores = torch.zeros(num_groups, num_blocks)
            if req_id != _NO_REQUEST:
                trace, now = self._future.trace(req_id)
                first = now + 1 + (self._delay if due.selections[row] else 0)
                found = window_scores(trace.mass, first, now + 1 + self._tau + self._delay, num_groups, self._aggregate)
                # A text that grew longer than the recorded one has blocks which that never had
                known = min(num_blocks, found.shape[1])
                scores[:, :known] = torch.from_numpy(found[:, :known])
            state.memory[0, :, place, :num_blocks] = scores.to(self.geometry.device)

    def forget(self, req_id: str) -> None:
        """Drop what was read for a request that ended."""
        self._future.forget(req_id)


def window_scores(
    mass: npt.NDArray[np.float16], first: int, stop: int, num_groups: int, aggregate: Aggregate
) -> npt.NDArray[np.float32]:
    """Combine the shares of a window of recorded tokens for each group of neighbouring layers.

    Args:
        mass: [2, T, L, n], mean and maximum over the heads.
        first: first token of the window; past the last recorded one, that one counts.
        stop: first token behind it.
        num_groups: G, split as evenly as a runtime splits the layers.
        aggregate: over window, layers and heads.

    Returns:
        float32 [G, n].
    """
    _, num_tokens, num_layers, _ = mass.shape
    start = min(first, num_tokens - 1)
    window = mass[0 if aggregate == "mean" else 1, start : max(stop, start + 1)].astype(np.float32)
    over_time = window.mean(0) if aggregate == "mean" else window.max(0)
    bounds = [num_layers * group // num_groups for group in range(num_groups + 1)]
    groups = [over_time[begin:end] for begin, end in pairwise(bounds)]
    return np.stack([group.mean(0) if aggregate == "mean" else group.max(0) for group in groups])
