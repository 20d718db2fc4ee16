"""Rows of `flashmemory eval`: what a dense and a sparse server answered, in one JSON file that a report is made of."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.files import write_json

FILE_NAME = "eval.json"
Side = Literal["dense", "sparse"]
SIDES: tuple[Side, ...] = get_args(Side)
SuiteName = Literal["parity", "loss", "needles", "ruler", "longbench"]
SUITES: tuple[SuiteName, ...] = get_args(SuiteName)
# Decode steps that attended to a larger share of their blocks than this were not sparse.
DENSE_SHARE = 0.999


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One figure of one server.

    Attributes:
        task: name of the task.
        tokens: tokens of a prompt.
        depth: share of the context that lies before the fact asked for, 0 to 1; None where there is no one fact.
        questions: how many were asked.
        score: the task's own score, 0 to 1; None for parity and loss, which have none.
        right: whether each answer is right, in the order of the questions, where an answer is right or wrong.
        wrong: the answers that are not right: `expected` and `answer`.
        details: what else was measured, see the suite.
    """

    task: str
    tokens: int
    questions: int
    score: float | None = None
    depth: float | None = None
    right: list[bool] | None = None
    wrong: list[dict[str, str]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRow(Figures):
    """A figure with what it was measured with.

    Attributes:
        suite: name of the suite.
        side: which server.
        part: name of what was measured at once; a part that has rows is not measured again.
        settings: what else decides which questions are asked and how.
        resident_share: blocks that decode steps attended to over blocks they would have dense, over all of the part;
            None if the server does not tell, as stock vLLM does not.
        seconds: wall-clock of the part.
        server_version: version of vLLM that the server tells, if it does.
        command: see `Provenance`, as are commit, gpu and versions.
        commit: commit of the checkout.
        gpu: name of the device of the machine that asked.
        versions: version by distribution on the machine that asked.
    """

    suite: SuiteName
    side: Side
    part: str
    settings: dict[str, Any]
    resident_share: float | None
    seconds: float
    server_version: str | None
    command: str
    commit: str
    gpu: str
    versions: dict[str, str]

    @property
    def question_key(self) -> tuple[object, ...]:
        """Equal for a dense and a sparse row that answer the same questions."""
        return self.suite, self.part, self.task, self.tokens, self.depth, json.dumps(self.settings, sort_keys=True)

    @property
    def is_sparse(self) -> bool:
        """Whether decode steps left out blocks, as far as the server tells."""
        return self.side == "sparse" and (self.resident_share is None or self.resident_share < DENSE_SHARE)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a file holds.

    Attributes:
        model: folder or Hugging Face id.
        servers: by side, how the server was started, or its URL.
        rows: in the order in which they were measured.
    """

    model: str
    servers: Mapping[Side, str]
    rows: Sequence[EvalRow] = ()

    def of(self, suite: SuiteName, side: Side) -> list[EvalRow]:
        """Rows of a suite and a side."""
        return [row for row in self.rows if (row.suite, row.side) == (suite, side)]

    def has(self, side: Side, part: str, settings: Mapping[str, object]) -> bool:
        """Whether a part was measured."""
        return any((row.side, row.part, row.settings) == (side, part, settings) for row in self.rows)

    def pairs(self) -> Iterator[tuple[EvalRow, EvalRow]]:
        """Dense and sparse rows of the same questions, in the order of the sparse ones."""
        dense = {row.question_key: row for row in self.rows if row.side == "dense"}
        for row in self.rows:
            if row.side == "sparse" and row.question_key in dense:
                yield dense[row.question_key], row


def load_evaluation(folder: Path) -> Evaluation | None:
    """Read the file of a folder; None if there is none.

    Raises:
        ConfigError: the file holds something else.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [EvalRow(**row) for row in found["rows"]]
        return Evaluation(found["model"], {side: found["servers"][side] for side in SIDES}, rows)
    except (KeyError, TypeError, ValueError) as error:
        names = ", ".join(column.name for column in fields(EvalRow))
        raise ConfigError(
            f"{path} ({type(error).__name__}: {error}): allowed is what flashmemory eval writes, an object with model, "
            f"servers and rows of {names}"
        ) from None


def save_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write the file of a folder; whoever reads it meets the old rows or the new ones, never a part."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE_NAME, asdict(evaluation))
