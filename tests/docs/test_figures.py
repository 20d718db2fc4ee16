"""Every figure of the README's tables is a value of the rows that the table names."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import README, ROOT

_ROWS = re.compile(r"\(docs/benchmarks/(\w+\.json)\)")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
LINES = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("|") and ".json)" in line]
# The share of the tokens that the ideal reads is a default, not a measurement
NOT_MEASURED = {"13.5"}


def _values(path: Path) -> Iterator[float]:
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    for row in rows:
        yield from (float(value) for value in row.values() if isinstance(value, int | float))


def _half_a_unit(text: str) -> float:
    """Half of what the last digit that is not a rounded zero stands for."""
    _, _, decimals = text.partition(".")
    if decimals:
        return float(0.5 * 10 ** -len(decimals))
    digits = text.replace(",", "")
    return float(0.5 * 10 ** (len(digits) - len(digits.rstrip("0"))))


def _unmeasured(line: str) -> list[str]:
    """Numbers of a line's value cells that no row has."""
    (name,) = _ROWS.findall(line)
    values = list(_values(ROOT / "docs" / "benchmarks" / name))
    cells = " ".join(line.split("|")[2:])
    return [
        text
        for text in set(_NUMBER.findall(cells)) - NOT_MEASURED
        if not any(abs(value - float(text.replace(",", ""))) <= _half_a_unit(text) * 1.001 for value in values)
    ]


@pytest.mark.parametrize("line", LINES)
def test_every_figure_is_in_a_row(line: str) -> None:
    assert _unmeasured(line) == []


def test_the_table_is_read() -> None:
    assert len(LINES) >= 5


def test_a_figure_without_a_row_is_found() -> None:
    assert _unmeasured("| x ([p1](docs/benchmarks/p1.json)) | 17.8 ms | 3.3 ms |") == ["3.3"]


# What the README's table of accuracies calls a task
TASKS = {
    "one needle": "multikey",
    "one key, three values": "multivalue",
    "three keys": "multiquery",
    "one needle, asked for after 144 generated tokens": "late",
    "two hops": "tracking",
}
TRIPLE = re.compile(r"\d\.\d\d / \d\.\d\d / \d\.\d\d")


@pytest.mark.parametrize("name", TASKS)
def test_accuracies_are_those_of_the_rows(name: str) -> None:
    # Selectors without training with their defaults, and when they read the question as the indexer does
    files = (ROOT / "docs" / "results" / name for name in ("indexer.json", "indexer-asked.json"))
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
    of_task = [row for row in rows if row["task"] == TASKS[name]]
    lengths = (4096, 16384, 32768)

    def best(*selectors: str) -> str:
        return " / ".join(
            f"{max(row['accuracy'] for row in of_task if row['selector'] in selectors and row['tokens'] == tokens):.2f}"
            for tokens in lengths
        )

    (line,) = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |")]
    untrained = {row["selector"] for row in of_task} - {"full", "oracle", "neural"}
    assert len(untrained) == 6
    assert TRIPLE.findall(line) == [best(*untrained), best("neural")]
    assert {row["accuracy"] for row in of_task if row["selector"] == "full"} == {1.0}
