"""Suites `ruler` and `longbench`: benchmarks that others defined, as parts of `flashmemory eval`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashmemory_vllm.evaluation.eval_rows import Figures
from flashmemory_vllm.evaluation.longbench import LongBenchOptions, run_longbench
from flashmemory_vllm.evaluation.ruler import RulerOptions, run_ruler
from flashmemory_vllm.evaluation.target import Target


@dataclass(frozen=True, slots=True)
class RulerPart:
    """One task of RULER at one length, see `run_ruler`.

    Attributes:
        task: name of the task.
        tokens: tokens of prompt and answer.
        tokenizer: the model's own, a folder or a Hugging Face id.
        limit: samples, from the first on.
        folder: the harness's files go into a folder of it for each side.
        options: how the harness asks.
    """

    task: str
    tokens: int
    tokenizer: str
    limit: int
    folder: Path
    options: RulerOptions

    def measure(self, target: Target) -> list[Figures]:
        """Ask one server.

        Raises:
            ConfigError: the harness is not installed, or the length does not fit the server.
            FlashMemoryError: the harness failed.
        """
        rows = run_ruler(
            target.url,
            target.model,
            self.tokenizer,
            [self.task],
            [self.tokens],
            self.limit,
            self.folder / target.side,
            self.options,
        )
        return [_figures(row) for row in rows]


@dataclass(frozen=True, slots=True)
class LongBenchPart:
    """LongBench v2 of a local file, see `run_longbench`; at temperature 0, so that two servers can be compared.

    Attributes:
        path: the file.
        tokenizer: the model's own, a folder or a Hugging Face id.
        max_tokens: prompts with more lose their middle; None for what the server leaves.
        folder: the answers go into a folder of it for each side.
        options: how questions are asked.
    """

    path: Path
    tokenizer: str
    max_tokens: int | None
    folder: Path
    options: LongBenchOptions

    def measure(self, target: Target) -> list[Figures]:
        """Ask one server; a figure for all questions, and one for each difficulty and length.

        Raises:
            ConfigError: the file is not of this format, or the length does not fit the server.
            FlashMemoryError: the server failed.
        """
        rows = run_longbench(
            target.url,
            target.model,
            self.tokenizer,
            self.path,
            self.folder / target.side,
            self.max_tokens,
            replace(self.options, temperature=0.0),
        )
        return [_figures(row) for row in rows]


def _figures(row: dict[str, Any]) -> Figures:
    names: Sequence[str] = ("stderr", "unparsable", "truncated")
    details = {name: row[name] for name in names if row[name] is not None}
    return Figures(
        task=row["task"], tokens=row["tokens"], questions=row["questions"], score=row["accuracy"], details=details
    )
