"""Tables of what was measured: the rows below `docs/`, as the pages of results show them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmemory_vllm.cli.markdown import table
from flashmemory_vllm.errors import ConfigError

if TYPE_CHECKING:
    from flashmemory_vllm.benchmark.rows import BenchRow

Row = Mapping[str, Any]

BENCHMARKS = "benchmarks"
EXACTNESS, TRANSFERS, KERNELS, CEILINGS, SELECTIONS = "exactness", "transfer", "kernels", "p7", "selection"
HOST, SERVING = "host-step", "serving"
# Files that are no rows of `flashmemory bench`; every other one is.
OTHER_FILES = frozenset({EXACTNESS, TRANSFERS, KERNELS, CEILINGS, SELECTIONS, HOST, SERVING})
# Transfers are measured in several numbers of pages, and kernels in many launch settings, which only the rows list.
SHOWN_PAGES = 512
TUNING_MARK = " | "


def accuracy_tables(folder: Path) -> str:
    """Exact match of every selector by task and length, at the same resident ratio.

    Args:
        folder: `docs/`; the rows are `results/core.json`.
    """
    return _accuracy(folder / "results" / "core.json")


def indexer_tables(folder: Path) -> str:
    """Scores of the trained indexer by task and length, beside every other selector's.

    Args:
        folder: `docs/`; the rows are `results/indexer.json`, and `results/indexer-asked.json` of selectors without
            training that read the question as the indexer does.
    """
    return _accuracy(*(folder / "results" / name for name in ("indexer.json", "indexer-asked.json")))


def equal_bytes_tables(folder: Path) -> str:
    """Scores of every selector by task and length, at the same device bytes.

    Args:
        folder: `docs/`; the rows are `results/reference.json`.
    """
    return _accuracy(folder / "results" / "reference.json")


def default_tables(folder: Path) -> str:
    """Scores of the default without training by task, beside other selectors and without one of its parts.

    Args:
        folder: `docs/`; the rows are `results/default.json`.
    """
    return _accuracy(folder / "results" / "default.json")


def _accuracy(*paths: Path) -> str:
    from flashmemory_vllm.evaluation.accuracy_rows import format_tables, load_rows

    return f"{format_tables([row for path in paths for row in load_rows(path)])}\n"


def speed_tables(folder: Path) -> str:
    """Stock vLLM and this backend on the same loads, a table for each scenario, with the commands below it.

    Args:
        folder: `docs/`; the rows are all files in `benchmarks/` that no other page shows.
    """
    from flashmemory_vllm.benchmark.rows import load_rows

    paths = sorted(path for path in (folder / BENCHMARKS).glob("*.json") if path.stem not in OTHER_FILES)
    parts = (part for path in paths for part in (*_scenarios(load_rows(path)), _origins(path, read_rows(path))))
    return "\n".join(parts)


def _scenarios(rows: "Sequence[BenchRow]") -> Iterator[str]:
    for name, model in dict.fromkeys((row.scenario, row.model) for row in rows):
        of_scenario = [row for row in rows if (row.scenario, row.model) == (name, model)]
        wanted = dict.fromkeys(f"- {row.measurement}: wanted {row.target}\n" for row in of_scenario if row.target)
        header = (
            *("measurement", "engine", "value", "x stock", "x ideal", "p50 ms", "p95 ms"),
            *("prefill tokens/s", "decoding", "same text"),
        )
        yield f"### {name} ({model})\n\n{table(header, map(_speed_cells, of_scenario))}"
        if wanted:
            yield "".join(wanted)


def _speed_cells(row: "BenchRow") -> tuple[str, ...]:
    return (
        row.measurement,
        row.engine,
        row.error or f"{_number(row.value)} {row.unit}",
        *map(_number, (row.ratio, row.ideal_ratio, row.p50_ms, row.p95_ms, row.prefill_tokens_per_s)),
        "" if row.decoding is None else f"{row.decoding} of {row.batch}",
        row.identical or "",
    )


def _number(value: float | None) -> str:
    """Three digits, and all of those before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def exactness_table(folder: Path) -> str:
    """Texts that equal those of stock vLLM at a resident ratio of 1, and of eager steps at less, by device and runner.

    Args:
        folder: `docs/`.
    """
    path, all_rows = _load(folder, EXACTNESS)
    rows = [row for row in all_rows if row["case"] != "sparse"]
    header = (
        *("model", "device", "decode", "dtype", "runner", "load", "equal texts"),
        *("slots", "logical blocks", "evictions", "recalls", "preemptions"),
    )
    names = ("slots", "logical_blocks", "evictions", "recalls", "preemptions")
    cells = (
        (
            row.get("model", "llama"),
            *(str(row[name]) for name in ("device", "mode", "dtype", "runner", "case")),
            f"{row['identical']} of {row['texts']}",
            *(f"{row[name]:,}" for name in names),
        )
        for row in rows
    )
    sparse = _sparse_table([row for row in all_rows if row["case"] == "sparse"])
    return f"{table(header, cells)}\n{sparse}{_origins(path, all_rows)}"


def _sparse_table(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    header = (
        *(
            "device",
            "decode",
            "dtype",
            "runner",
            "load",
            "layer groups",
            "ratio",
            "texts equal to eager",
            "right answers",
        ),
        *("evictions", "prefetches", "streamed", "outputs checked", "largest error", "allowed"),
    )
    cells = (
        (
            *(str(row[name]) for name in ("device", "mode", "dtype", "runner", "load", "layer_groups", "ratio")),
            f"{row['identical']} of {row['texts']}",
            "" if row["answers_right"] is None else f"{row['answers_right']} of {row['texts']}",
            *(f"{row[name]:,}" for name in ("evictions", "prefetches", "streamed", "oracle_outputs")),
            "not a number" if row["oracle_max_error"] is None else f"{row['oracle_max_error']:.1e}",
            f"{row['tolerance']:.1e}",
        )
        for row in rows
    )
    return f"### Sparse decode\n\n{table(header, cells)}\n"


def soak_tables(folder: Path) -> str:
    """What long runs under load came to, a table for each file of rows.

    Args:
        folder: `docs/`; the rows are the files `results/soak-*.json`.
    """
    from flashmemory_vllm.soak.report import format_report
    from flashmemory_vllm.soak.rows import load_rows

    parts = [
        f"### {path.stem}\n\n{format_report(load_rows(path))}\n{_origins(path, read_rows(path))}"
        for path in sorted((folder / "results").glob("soak-*.json"))
    ]
    return "\n".join(parts) or "No run is recorded yet.\n"


def device_tables(folder: Path) -> str:
    """What link and kernels reach: copies of many pages, each kernel at the sizes of an 8B model, whole selections.

    Args:
        folder: `docs/`.
    """
    return "\n".join((_ceilings(folder), _transfers(folder), _kernels(folder), _selections(folder)))


def _ceilings(folder: Path) -> str:
    path, rows = _load(folder, CEILINGS)
    header = ("measurement", "value", "unit", "a plain copy reaches", "share of it")
    cells = (
        (row["measurement"], f"{row['value']:,.1f}", row["unit"], f"{row['ideal']:,.1f}", f"{row['ratio']:.0%}")
        for row in rows
    )
    return f"### Against a plain copy\n\n{table(header, cells)}\n{_origins(path, rows)}"


def _transfers(folder: Path) -> str:
    path, rows = _load(folder, TRANSFERS)
    header = ("direction", "page KiB", "method", "GB/s", "memory-bound work beside it", "compute-bound work beside it")
    cells = (
        (
            row["direction"],
            f"{row['page_kib']:,}",
            _method(row["method"]),
            f"{row['gb_per_s']:.1f}",
            f"+{row['memory_slowdown']:.0f} % time",
            f"+{row['compute_slowdown']:.0f} % time",
        )
        for row in rows
        if row["pages"] == SHOWN_PAGES
    )
    return f"### Copies of {SHOWN_PAGES} pages\n\n{table(header, cells)}\n{_origins(path, rows)}"


def _method(name: str) -> str:
    return "copy engines" if name == "dma" else f"kernel of {name.removeprefix('kernel ')} programs"


def _kernels(folder: Path) -> str:
    path, rows = _load(folder, KERNELS)
    header = ("operation", "case", "µs", "GB/s", "share of what a plain copy reaches")
    cells = (
        (
            f"`{row['op']}`",
            row["case"],
            f"{row['us']:,.1f}",
            f"{row['gb_per_s']:,.1f}",
            f"{row['share']:.1%}",
        )
        for row in rows
        if TUNING_MARK not in row["case"]
    )
    return f"### Kernels\n\n{table(header, cells)}\n{_origins(path, rows)}"


def _selections(folder: Path) -> str:
    path, rows = _load(folder, SELECTIONS)
    header = (
        "selector and context",
        "µs",
        "µs of the host",
        "MiB read",
        "index bytes a token",
        "share of a plain copy",
    )
    cells = (
        (
            row["measurement"],
            f"{row['value']:,.0f}",
            f"{row['host_us']:,.0f}",
            f"{row['device_bytes'] / (1 << 20):,.1f}",
            f"{row['index_bytes_per_token']:,.1f}",
            f"{row['share']:.1%}",
        )
        for row in rows
    )
    return f"### Selections\n\n{table(header, cells)}\n{_origins(path, rows)}"


def _load(folder: Path, name: str) -> tuple[Path, list[Row]]:
    path = folder / BENCHMARKS / f"{name}.json"
    return path, read_rows(path)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        ConfigError: it is missing or no JSON.
    """
    try:
        rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): allowed is a JSON list of rows") from None
    return rows


def _origins(path: Path, rows: Sequence[Row]) -> str:
    """Where the rows lie and what measured them."""
    lines = dict.fromkeys(f"{measured_where(row)}: `{row['command']}`" for row in rows)
    return "\n".join((f"Rows: [{path.name}](../{path.parent.name}/{path.name}), from", "", *lines, ""))


def measured_where(row: Row) -> str:
    """Device, versions and commit of a row, as an entry of a list."""
    return f"- {row['gpu'] or 'CPU'}, {_versions(row['versions'])}, commit {row['commit']}"


def _versions(versions: Mapping[str, str]) -> str:
    shown: Iterable[str] = (name for name in ("vllm", "torch") if name in versions)
    return ", ".join(f"{name} {versions[name]}" for name in shown)
