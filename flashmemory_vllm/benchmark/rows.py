"""Rows of the benchmark: what was measured, beside what stock vLLM needs for the same, in JSON and in Markdown."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from flashmemory_vllm.benchmark.scenario import Metric
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.files import write_json

# Field of a row and unit of each metric; of the first kind less is better
_METRICS: dict[Metric, tuple[str, str]] = {
    "step_ms": ("p50_ms", "ms/step"),
    "decode_tokens_per_s": ("decode_tokens_per_s", "tokens/s"),
    "prefill_tokens_per_s": ("prefill_tokens_per_s", "tokens/s"),
    "output_tokens_per_s": ("output_tokens_per_s", "tokens/s"),
    "stall_share": ("stall_share", "share of time"),
    "decoding": ("decoding", "requests"),
}
_LESS_IS_BETTER = frozenset({"step_ms", "stall_share"})

_HEADER = (
    "measurement",
    "engine",
    "value",
    "unit",
    "x stock",
    "x ideal",
    "p50 ms",
    "p95 ms",
    "prefill tokens/s",
    "decode tokens/s",
    "decoding",
    "stall s",
    "same text",
    "note",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One measurement on one engine.

    Attributes:
        scenario: name of the scenario.
        measurement: name of the measurement.
        engine: stock, ideal (stock with 13.5 % of the tokens), offload (stock with vLLM's own KV offloading) or
            flashmemory.
        model: what was served.
        metric: what `value` is.
        prompt_tokens: prompt tokens of all requests.
        context: prompt tokens of the longest.
        batch: requests.
        output_tokens: tokens that each generated together with all others.
        value: the figure that the scenario asks for, None if there is an error or no such figure.
        unit: of `value`, `stock` and `ideal`.
        stock: value of the stock engine on the same measurement.
        ideal: value of the ideal.
        ratio: how many times better than stock this is: above 1 is faster. Steps are only compared where both engines
            decoded as many requests at once.
        ideal_ratio: the same against the ideal.
        target: what was hoped for, in words.
        error: why there is no value; the first line of what the engine said.
        decoding: most requests that got a token in the same step; `requests` is the same.
        steps: decode steps with that many requests, on which the times rest; the first ones are left out.
        p50_ms: median time of those steps in milliseconds; `step_ms` is the same.
        p95_ms: 95th percentile.
        mean_ms: mean.
        decode_tokens_per_s: `decoding` over the mean.
        prefill_tokens_per_s: prompt tokens over the time from submission to the last request's first token.
        output_tokens_per_s: generated tokens over the time from submission to the end.
        seconds: from submission to the end.
        stall_seconds: time that the device waited for copies or scores before a step, like the counters below for the
            run.
        bytes_h2d: recalled from host to device.
        bytes_streamed: read from the host by prefill without getting a slot.
        bytes_d2h: written back.
        selections: resident sets chosen anew.
        late_recalls: steps that waited for a recall.
        preemptions: requests preempted by the scheduler.
        device_kv_bytes: device memory of KV pages and states, without index keys and staging.
        max_model_len: of the engine, as it started.
        identical: texts that are token for token stock's, of how many: `8/8`.
        texts: digests of the generated ids by request, if the measurement compares them.
        stall_share: stall over the time of the steady steps; it and the rest only with `keep_steps`.
        steps_ms: time of every steady step.
        selecting_steps: which of them are within two steps of a selection.
        selecting_p50_ms: median of those.
        selecting_p95_ms: 95th percentile of those.
        other_p50_ms: median of the others.
        other_p95_ms: 95th percentile of the others.
        command: see `Provenance`, as are commit, gpu and versions.
        commit: commit of the checkout.
        gpu: name of the device.
        versions: version by distribution.
    """

    scenario: str
    measurement: str
    engine: str
    model: str
    metric: Metric
    prompt_tokens: int
    batch: int
    output_tokens: int
    context: int | None = None
    value: float | None = None
    unit: str = ""
    stock: float | None = None
    ideal: float | None = None
    ratio: float | None = None
    ideal_ratio: float | None = None
    target: str | None = None
    error: str | None = None
    decoding: int | None = None
    requests: int | None = None
    steps: int | None = None
    p50_ms: float | None = None
    step_ms: float | None = None
    p95_ms: float | None = None
    mean_ms: float | None = None
    decode_tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None
    output_tokens_per_s: float | None = None
    seconds: float | None = None
    stall_seconds: float | None = None
    bytes_h2d: int | None = None
    bytes_streamed: int | None = None
    bytes_d2h: int | None = None
    selections: int | None = None
    late_recalls: int | None = None
    preemptions: int | None = None
    device_kv_bytes: int | None = None
    max_model_len: int | None = None
    identical: str | None = None
    texts: list[str] | None = None
    stall_share: float | None = None
    steps_ms: list[float] | None = None
    selecting_steps: list[int] | None = None
    selecting_p50_ms: float | None = None
    selecting_p95_ms: float | None = None
    other_p50_ms: float | None = None
    other_p95_ms: float | None = None
    command: str
    commit: str
    gpu: str
    versions: dict[str, str]

    @property
    def key(self) -> tuple[str, str, str]:
        """Tells the rows of one model apart."""
        return self.scenario, self.measurement, self.engine


def with_comparisons(rows: Sequence[BenchRow]) -> list[BenchRow]:
    """The same rows, each beside stock's and the ideal's value of its measurement and model."""
    by_key = {(row.model, *row.key): row for row in rows}

    def compared(row: BenchRow) -> BenchRow:
        stock, ideal = (by_key.get((row.model, row.scenario, row.measurement, name)) for name in ("stock", "ideal"))
        return replace(
            row,
            value=_value(row),
            unit=_METRICS[row.metric][1],
            stock=None if stock is None else _value(stock),
            ideal=None if ideal is None else _value(ideal),
            ratio=None if row.engine == "stock" else _times_better(row, stock),
            ideal_ratio=None if row.engine == "ideal" else _times_better(row, ideal),
            identical=_identical(row, stock),
        )

    return [compared(row) for row in rows]


def _value(row: BenchRow) -> float | None:
    value: float | None = None if row.error else getattr(row, _METRICS[row.metric][0])
    return value


def _times_better(row: BenchRow, other: BenchRow | None) -> float | None:
    value, others = _value(row), other and _value(other)
    if not value or not others:
        return None
    # A step of fewer requests is no faster step
    if row.metric == "step_ms" and other is not None and row.decoding != other.decoding:
        return None
    return others / value if row.metric in _LESS_IS_BETTER else value / others


def _identical(row: BenchRow, stock: BenchRow | None) -> str | None:
    if stock is None or row.engine in {"stock", "ideal"} or row.texts is None or stock.texts is None:
        return None
    same = sum(one == other for one, other in zip(row.texts, stock.texts, strict=False))
    return f"{same}/{len(stock.texts)}"


def load_rows(path: Path) -> list[BenchRow]:
    """Read the rows of a file; none if it does not exist.

    Raises:
        ConfigError: the file holds something else.
    """
    if not path.exists():
        return []
    try:
        return [BenchRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} does not hold benchmark rows: {error}") from None


def save_rows(path: Path, rows: Sequence[BenchRow]) -> None:
    """Write the rows so that an interrupted run leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [asdict(row) for row in rows])


def format_tables(rows: Sequence[BenchRow]) -> str:
    """One Markdown table for each scenario and model; above 1 a ratio says faster than the other."""
    groups: dict[tuple[str, str], list[BenchRow]] = {}
    for row in rows:
        groups.setdefault((row.scenario, row.model), []).append(row)
    return "\n".join(f"### {name} ({model})\n\n{_table(group)}" for (name, model), group in groups.items())


def _table(rows: Sequence[BenchRow]) -> str:
    lines = [_HEADER, ("---",) * len(_HEADER), *map(_cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: BenchRow) -> tuple[str, ...]:
    note = row.error or (f"target: {row.target}" if row.target else "")
    return (
        row.measurement,
        row.engine,
        _number(row.value),
        row.unit,
        _number(row.ratio),
        _number(row.ideal_ratio),
        _number(row.p50_ms),
        _number(row.p95_ms),
        _number(row.prefill_tokens_per_s),
        _number(row.decode_tokens_per_s),
        "" if row.decoding is None else f"{row.decoding} of {row.batch}",
        _number(row.stall_seconds),
        row.identical or "",
        note.replace("|", "\\|"),
    )


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def measured_fields(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that a row has a field for."""
    known = {field.name for field in fields(BenchRow)}
    return {name: value for name, value in figures.items() if name in known}
