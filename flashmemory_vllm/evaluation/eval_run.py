"""What `flashmemory eval` measures on a server: part by part, each written to the file as soon as it is done."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.eval_rows import (
    DENSE_SHARE,
    FILE_NAME,
    SIDES,
    EvalRow,
    Evaluation,
    Figures,
    Side,
    SuiteName,
    load_evaluation,
    save_evaluation,
)
from flashmemory_vllm.evaluation.parity import PARITY_FOLDER
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.evaluation.target import Target


class Measurable(Protocol):
    """What a part does."""

    def measure(self, target: Target) -> list[Figures]:
        """Ask one server."""


@dataclass(frozen=True, slots=True)
class Part:
    """What is measured at once, on either server.

    Attributes:
        suite: its suite.
        name: tells it from the other parts.
        settings: what else decides which questions are asked and how.
        measurable: does it.
    """

    suite: SuiteName
    name: str
    measurable: Measurable
    settings: Mapping[str, Any] = field(default_factory=dict)


class EvalRun:
    """Measures the parts that a folder has no rows of yet.

    Args:
        folder: for `eval.json` and what the suites keep.
        model: folder or Hugging Face id of the model.
        servers: by side, how the server is started, or its URL.
        provenance: where the rows come from.

    Raises:
        ConfigError: on construction, the folder holds an evaluation of another model or other servers.
    """

    def __init__(self, folder: Path, model: str, servers: Mapping[Side, str], provenance: Provenance) -> None:
        fresh = Evaluation(model, dict(servers))
        found = load_evaluation(folder) or fresh
        given = {"model": (found.model, model)} | {side: (found.servers[side], servers[side]) for side in SIDES}
        for name, (old, new) in given.items():
            if old != new:
                raise ConfigError(
                    f"--out: {folder / FILE_NAME} holds rows of another {name} ({old}), asked is {new}; allowed is the "
                    "same, or another folder"
                )
        self._folder = folder
        self._provenance = provenance
        self.evaluation = found

    def missing(self, side: Side, parts: Sequence[Part]) -> list[Part]:
        """Parts that have no rows of a side yet."""
        return [part for part in parts if not self.evaluation.has(side, part.name, part.settings)]

    def run(self, target: Target, parts: Sequence[Part]) -> None:
        """Measure what is missing on one server, showing progress.

        Raises:
            ConfigError: a part does not fit the server.
            FlashMemoryError: the server failed; the parts before that are kept.
        """
        missing = self.missing(target.side, parts)
        with tqdm(total=len(missing), desc=target.side, unit="part") as progress:
            for part in missing:
                progress.set_postfix_str(part.name)
                rows = [*self.evaluation.rows, *self._measure(part, target)]
                self.evaluation = replace(self.evaluation, rows=rows)
                save_evaluation(self._folder, self.evaluation)
                progress.update()

    def _measure(self, part: Part, target: Target) -> list[EvalRow]:
        before, began = target.read_blocks(), time.monotonic()
        figures = part.measurable.measure(target)
        seconds = time.monotonic() - began
        share = _share(before, target.read_blocks())
        if target.side == "dense" and share is not None and share < DENSE_SHARE:
            raise ConfigError(
                f"the dense server at {target.url} attended to {share:.1%} of its blocks: allowed is a server of stock "
                "vLLM, or one with resident_ratio 1.0"
            )
        return [
            EvalRow(
                suite=part.suite,
                side=target.side,
                part=part.name,
                settings=dict(part.settings),
                resident_share=share,
                seconds=round(seconds, 1),
                server_version=target.version,
                **asdict(figure),
                **asdict(self._provenance),
            )
            for figure in figures
        ]


def adopt_dense(source: Path, folder: Path, model: str, sparse: str) -> str:
    """Begin an evaluation with the dense rows of another one, unless the folder has begun already.

    Args:
        source: folder of the other evaluation.
        folder: folder of the new one.
        model: folder or Hugging Face id of the model.
        sparse: the sparse server of the new one, as `ServerChoice.description` tells it.

    Returns:
        The dense server of the other one.

    Raises:
        ConfigError: the other one does not exist or is of another model.
    """
    found = load_evaluation(source)
    if found is None or found.model != model:
        told = "has no rows" if found is None else f"is of the model {found.model!r}"
        raise ConfigError(f"--dense-from: {source} {told}; allowed is the --out of an evaluation of {model!r}")
    dense = found.servers["dense"]
    if not (folder / FILE_NAME).exists():
        if (source / PARITY_FOLDER).is_dir():
            shutil.copytree(source / PARITY_FOLDER, folder / PARITY_FOLDER, dirs_exist_ok=True)
        rows = [row for row in found.rows if row.side == "dense"]
        save_evaluation(folder, Evaluation(model, {"dense": dense, "sparse": sparse}, rows))
    return dense


def _share(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float | None:
    """Blocks attended to over blocks of the context, between two readings."""
    if before is None or after is None:
        return None
    resident, context = (end - start for start, end in zip(before, after, strict=True))
    return resident / context if context else None
