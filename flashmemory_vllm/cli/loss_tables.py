"""What sparse decode costs real language models: `docs/results/real.json` as its page shows it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from flashmemory_vllm.cli.markdown import table
from flashmemory_vllm.cli.measured_tables import Row, measured_where, read_rows

_HEADER = (
    *("cell", "selector", "tau", "ratio", "above dense, nats a token", "standard error"),
    *("blocks fetched a token", "device share of KV", "documents"),
)


def loss_tables(folder: Path) -> str:
    """Loss above dense attention's by model and length of the prompts, the smallest first.

    Args:
        folder: `docs/`; the rows are `results/real.json`.
    """
    rows = read_rows(folder / "results" / "real.json")
    places = dict.fromkeys((row["model"], row["context"]) for row in rows)
    return "\n".join(part for place in places for part in _place(*place, rows)) + _origin(rows)


def _place(model: str, context: int, rows: Sequence[Row]) -> Iterator[str]:
    here = sorted((row for row in rows if (row["model"], row["context"]) == (model, context)), key=_gap)
    (dense,) = {row["dense"] for row in here}
    yield f"### {model}, {context:,} tokens\n\nDense attention: {dense:.3f} nats a token.\n"
    yield table(_HEADER, map(_cells, here))


def _gap(row: Row) -> float:
    return float(row["gap"])


def _cells(row: Row) -> tuple[str, ...]:
    fetched, share = row["blocks_per_token"], row["device_share"]
    return (
        row["cell"],
        row["selector"],
        str(row["tau"]),
        f"{row['ratio']:g}",
        f"{row['gap']:.3f}",
        "" if row["se"] is None else f"{row['se']:.3f}",
        "" if fetched is None else f"{fetched:.2f}",
        "" if share is None else f"{share:.1%}",
        str(row["documents"]),
    )


def _origin(rows: Sequence[Row]) -> str:
    where = dict.fromkeys(map(measured_where, rows))
    return "\n".join(("\nRows, each with its command: [real.json](../results/real.json), from", "", *where, ""))
