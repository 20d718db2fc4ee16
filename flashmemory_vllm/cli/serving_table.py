"""The page of speeds: tables of `flashmemory bench`, and of its serving scenarios where there are rows of them."""

from pathlib import Path

from flashmemory_vllm.benchmark.serving_rows import format_serving_tables, load_serving_rows
from flashmemory_vllm.cli.measured_tables import BENCHMARKS, SERVING, measured_where, read_rows, speed_tables


def speed_page(folder: Path) -> str:
    """All tables of the page.

    Args:
        folder: `docs/`; the rows lie in `benchmarks/`.
    """
    return "\n".join(part for part in (speed_tables(folder), serving_tables(folder)) if part)


def serving_tables(folder: Path) -> str:
    """What users of a server get, stock vLLM beside this backend, with the commands below; empty without rows.

    Args:
        folder: `docs/`; the rows are `benchmarks/serving.json`.
    """
    path = folder / BENCHMARKS / f"{SERVING}.json"
    if not path.exists():
        return ""
    origins = dict.fromkeys(f"{measured_where(row)}: `{row['command']}`" for row in read_rows(path))
    link = f"[{path.name}](../{BENCHMARKS}/{path.name})"
    return f"{format_serving_tables(load_serving_rows(path))}\nRows: {link}, from\n\n" + "\n".join((*origins, ""))
