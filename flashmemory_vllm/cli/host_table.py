"""What a decode step costs the host, as the page of results shows it."""

from collections.abc import Iterator
from pathlib import Path

from flashmemory_vllm.cli.markdown import table
from flashmemory_vllm.cli.measured_tables import BENCHMARKS, HOST, Row, measured_where, read_rows

# What is shown of the parts, the sums; a reader of the rows has all
SHOWN = ("all selections", "all")


def host_table(folder: Path) -> str:
    """Microseconds of a step by load, before and after, with and without compiled loops.

    Args:
        folder: `docs/`; the rows are `benchmarks/host-step.json`.
    """
    rows = read_rows(folder / BENCHMARKS / f"{HOST}.json")
    header = ("rows x tokens", "code", "loops", "selections: p10", "median", "p95", "whole step: p10", "median", "p95")
    runs = dict.fromkeys((row["measurement"], row["commit"], row["is_compiled"]) for row in rows)
    cells = ((load, commit, "compiled" if is_it else "numpy", *_shown(rows, (load, commit, is_it)))
             for load, commit, is_it in runs)  # fmt: skip
    origins = dict.fromkeys(f"{measured_where(row)}: `{row['command']}`" for row in rows)
    path = f"[{HOST}.json](../{BENCHMARKS}/{HOST}.json)"
    return f"{table(header, cells)}\nRows, with all parts: {path}, from\n\n" + "\n".join((*origins, ""))


def _shown(rows: list[Row], run: tuple[str, str, bool]) -> Iterator[str]:
    for part in SHOWN:
        (row,) = (
            row for row in rows if (row["measurement"], row["commit"], row["is_compiled"], row["part"]) == (*run, part)
        )
        yield from (f"{row[name]:,.0f}" for name in ("p10", "value", "p95"))
