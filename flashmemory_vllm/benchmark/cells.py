"""Expands scenarios into cells, one for each measurement and engine, and groups cells that one process can measure."""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashmemory_vllm.benchmark.measure import WARM_UP_STREAMS, Work
from flashmemory_vllm.benchmark.scenario import (
    IDEAL_PER_MILLE,
    EngineChange,
    EngineName,
    EngineOptions,
    Measurement,
    Metric,
    Scenario,
)

GIB = 1 << 30
# vLLM fits the length of the longest request to the memory when it is given this one
FIT_TO_MEMORY = -1
DEFAULT_OFFLOADING_GIB = 32.0
# Steps of a chunked prefill are counted with this where a scenario does not say otherwise; vLLM's is not smaller
_DEFAULT_BATCHED_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """How an engine is started.

    Attributes:
        llm: arguments of `vllm.LLM`.
        ours: options of our section of `additional_config`, or None for vLLM's own backend.
    """

    llm: Mapping[str, Any]
    ours: Mapping[str, Any] | None

    @property
    def key(self) -> str:
        """The same for setups that one process can serve."""
        return json.dumps([dict(self.llm), None if self.ours is None else dict(self.ours)], sort_keys=True)


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement on one engine.

    Attributes:
        scenario: name of the scenario.
        measurement: name of the measurement in it.
        engine: name of the engine.
        metric: what `value` of the row is.
        target: what one hopes to see, in words.
        setup: how the engine is started.
        work: what it is given.
    """

    scenario: str
    measurement: str
    engine: EngineName
    metric: Metric
    target: str | None
    setup: EngineSetup
    work: Work

    @property
    def key(self) -> tuple[str, str, str]:
        """Tells the cells of several scenarios apart."""
        return self.scenario, self.measurement, self.engine


def make_cells(scenario: Scenario, engines: Sequence[EngineName], model: Mapping[str, Any]) -> list[Cell]:
    """Every cell of a scenario.

    Args:
        scenario: the file.
        engines: engines to measure where a measurement does not choose its own.
        model: arguments of `vllm.LLM` that say what model to serve.
    """
    cells = []
    for measurement in scenario.all_measurements():
        chosen = list(engines if measurement.engines is None else measurement.engines)
        if measurement.ideal and "ideal" not in chosen and "stock" in chosen:
            chosen.insert(chosen.index("stock") + 1, "ideal")
        cells += [_make_cell(scenario, measurement, engine, model) for engine in dict.fromkeys(chosen)]
    return cells


def group_by_setup(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that share an engine's configuration, in the order in which each configuration first appears."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.setup.key, []).append(cell)
    return list(groups.values())


def _make_cell(scenario: Scenario, measurement: Measurement, engine: EngineName, model: Mapping[str, Any]) -> Cell:
    change = _change(measurement, engine)
    options = scenario.engine.updated(measurement.engine).updated(change.engine)
    lens = measurement.prompt_lens()
    if change.prompt_tokens is not None:
        lens = [change.prompt_tokens] * len(lens)
    elif engine == "ideal":
        lens = [-(-length * IDEAL_PER_MILLE // 1000) for length in lens]
    is_ours = engine == "flashmemory"
    ours = {**scenario.flashmemory, **measurement.flashmemory} if is_ours else None
    return Cell(
        scenario=scenario.name,
        measurement=measurement.name,
        engine=engine,
        metric=measurement.metric,
        target=measurement.target,
        setup=EngineSetup({**model, **llm_arguments(options, engine == "offload")}, ours),
        work=_make_work(scenario, measurement, lens, options.max_num_batched_tokens),
    )


def _change(measurement: Measurement, engine: EngineName) -> EngineChange:
    if engine == "flashmemory":
        return EngineChange()
    own = measurement.offload if engine == "offload" else None
    if own is None:
        own = measurement.stock
    # The ideal has fewer tokens than stock, however many stock has
    return own if engine != "ideal" else own.model_copy(update={"prompt_tokens": None})


def llm_arguments(options: EngineOptions, offloads: bool) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; those of `vllm serve` are the same with hyphens.

    Args:
        options: as a scenario has them.
        offloads: vLLM's own KV offloading is switched on.
    """
    plain = options.model_dump(
        include={"max_num_seqs", "max_num_batched_tokens", "enforce_eager", "block_size", "dtype"}, exclude_none=True
    )
    if options.max_model_len is not None:
        plain["max_model_len"] = FIT_TO_MEMORY if options.max_model_len == "largest" else options.max_model_len
    if options.kv_cache_memory_gib is not None:
        plain["kv_cache_memory_bytes"] = int(options.kv_cache_memory_gib * GIB)
    if options.cudagraph_capture_sizes is not None:
        plain["compilation_config"] = {"cudagraph_capture_sizes": sorted(options.cudagraph_capture_sizes)}
    if offloads:
        plain["kv_offloading_size"] = options.kv_offloading_gib or DEFAULT_OFFLOADING_GIB
    return plain | options.llm


def _make_work(scenario: Scenario, measurement: Measurement, lens: Sequence[int], batched_tokens: int | None) -> Work:
    # While the prompts that follow are in prefill, a request generates a token for each of their chunks. Where
    # prefill is all that matters it does not
    slack = -(-sum(lens) // (batched_tokens or _DEFAULT_BATCHED_TOKENS)) + len(lens)
    is_alone = len(lens) == 1 or measurement.metric == "prefill_tokens_per_s"
    # Engines get the same prompts, measurements different ones, unless prefixes are to be found again
    streams = 0 if measurement.keep_prefixes else 1 + _hash(f"{scenario.name}/{measurement.name}")
    return Work(
        prompt_lens=tuple(lens),
        output_tokens=measurement.output_tokens,
        slack_tokens=0 if is_alone else slack,
        streams=streams,
        shared_prefix=measurement.shared_prefix,
        keep_prefixes=measurement.keep_prefixes,
        compare_outputs=measurement.compare_outputs,
        keep_steps=measurement.keep_steps,
        warm_ups=measurement.warm_ups,
        must_fit=measurement.must_fit,
    )


def _hash(text: str) -> int:
    return zlib.crc32(text.encode()) % (WARM_UP_STREAMS - 1)
