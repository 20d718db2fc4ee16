"""The engines behind `flashmemory accuracy`: which cells share one, how it starts, and the process it runs in."""

import multiprocessing
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from flashmemory_vllm.config import SECTION, FlashMemoryConfig
from flashmemory_vllm.errors import FlashMemoryError
from flashmemory_vllm.evaluation import vocabulary
from flashmemory_vllm.evaluation.accuracy import AccuracyRun, Cell, Conditions, Generator
from flashmemory_vllm.evaluation.accuracy_plan import ORACLE
from flashmemory_vllm.evaluation.accuracy_rows import Setting
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.evaluation.questions import answer_len

if TYPE_CHECKING:
    from flashmemory_vllm.runtime.shape import AttentionShape

# Shorter prompts keep every block.
MIN_SPARSE_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Start:
    """One engine and what is measured on it.

    Attributes:
        cells: in the order in which they are measured.
        engine: arguments of `vllm.LLM`.
        options: our options at start.
    """

    cells: Sequence[Cell]
    engine: Mapping[str, object]
    options: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class EngineChoices:
    """What the command line says about engines.

    Attributes:
        block_size: tokens in a KV block.
        dtype: dtype of the model.
        eager: no compilation and no CUDA graphs, and one engine for all cells.
        gpu_memory_bytes: device memory for KV, None for vLLM's share.
        host_memory_gib: host memory for KV, None for our default.
    """

    block_size: int
    dtype: str
    eager: bool
    gpu_memory_bytes: int | None
    host_memory_gib: float | None


@dataclass(frozen=True, slots=True)
class Job:
    """What a process of an engine is told.

    Attributes:
        model: folder of the model.
        start: the engine and its cells.
        conditions: what the cells have in common.
        oracle_data: captures for the selector `oracle`; may be empty.
        path: file of the rows.
        command: words of the command line.
        commit: commit to name. None to ask git.
        deadline: no cell is begun after this time, of `time.monotonic()`. None for never.
    """

    model: Path
    start: Start
    conditions: Conditions
    oracle_data: Sequence[Path]
    path: Path
    command: Sequence[str]
    commit: str | None
    deadline: float | None


def index_bytes(setting: Setting, shape: "AttentionShape") -> int:
    """Device bytes of a block's index keys under a setting.

    Raises:
        ConfigError: the setting is not allowed for this model, or its indexer cannot be read or does not fit.
    """
    from flashmemory_vllm.runtime.assembly import index_bytes_per_block

    # The oracle has no index, and none can be made here
    return 0 if setting.selector == ORACLE else index_bytes_per_block(_config(setting), shape)


def _config(setting: Setting) -> FlashMemoryConfig:
    return FlashMemoryConfig.from_additional_config({SECTION: setting.options()})


def plan_starts(cells: Sequence[Cell], shape: "AttentionShape", choices: EngineChoices) -> list[Start]:
    """Split cells between two engines at most.

    Captured CUDA graphs write the queries of certain layers for certain layer groups. Most cells agree in these;
    those that do not share an engine without graphs, which starts faster than one for each.

    Args:
        cells: what to measure.
        shape: the model's attention layers.
        choices: how engines are started.

    Raises:
        ConfigError: a setting is not allowed for this model, or its indexer cannot be read or does not fit.
    """
    from flashmemory_vllm.runtime.assembly import anchor_layers

    bytes_of: dict[Setting, int] = {}
    by_graphs: dict[object, list[Cell]] = {}
    for cell in cells:
        config = _config(cell.setting)
        by_graphs.setdefault((config.layer_groups, anchor_layers(config, shape)), []).append(cell)
        bytes_of[cell.setting] = index_bytes(cell.setting, shape)
    with_graphs = [] if choices.eager else max(by_graphs.values(), key=len, default=[])
    without = [cell for group in by_graphs.values() if group is not with_graphs for cell in group]
    split = ((with_graphs, False), (without, True))
    return [_start(group, bytes_of, choices, eager=eager) for group, eager in split if group]


def _start(cells: Sequence[Cell], bytes_of: Mapping[Setting, int], choices: EngineChoices, *, eager: bool) -> Start:
    """The largest of everything, since the scheduler keeps to the budgets of the start for good.

    It starts with the setting whose index takes the most device memory, so that what is left for slots is right for
    all.
    """
    largest = max((cell.setting for cell in cells), key=bytes_of.__getitem__)
    options = largest.options() | {
        "resident_ratio": max(cell.setting.ratio for cell in cells),
        # Accuracy is to be measured at lengths, too, at which a small model gains nothing
        "min_sparse_tokens": MIN_SPARSE_TOKENS,
    }
    if choices.host_memory_gib is not None:
        options["host_memory_gib"] = choices.host_memory_gib
    engine: dict[str, object] = {
        "max_model_len": max(cell.tokens + answer_len(cell.task) for cell in cells),
        "max_num_seqs": max(cell.batch for cell in cells),
        "block_size": choices.block_size,
        "dtype": choices.dtype,
        "enforce_eager": eager,
        "enable_prefix_caching": True,
    }
    if choices.gpu_memory_bytes is not None:
        engine["kv_cache_memory_bytes"] = choices.gpu_memory_bytes
        # vLLM refuses to start when less than this share of the device is free, though the size is given.
        engine["gpu_memory_utilization"] = 0.1
    return Start(cells, engine, options)


def measure(job: Job) -> None:
    """Measure on an engine in a process of its own, since no process can start a second one.

    Raises:
        FlashMemoryError: as raised there, or the process ended otherwise.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(job, theirs))
    process.start()
    theirs.close()
    try:
        process.join()
    finally:
        process.terminate()
        process.join()
    try:
        raise ours.recv()
    except EOFError:
        if process.exitcode:
            raise FlashMemoryError(f"the engine's process ended with {process.exitcode}; its log is above") from None


def _measure(job: Job, errors: Connection) -> None:
    try:
        with _generator(job) as generator:
            provenance = Provenance.collect(job.command, job.commit)
            AccuracyRun(generator, job.conditions, provenance, job.path, job.deadline).run(job.start.cells)
    except FlashMemoryError as error:
        errors.send(error)


def _generator(job: Job) -> AbstractContextManager[Generator]:
    from flashmemory_vllm.plugin.capture import OracleGenerator
    from flashmemory_vllm.plugin.offline import OfflineGenerator
    from flashmemory_vllm.plugin.recorded_prompts import RecordedPrompts

    engine, options, stop = job.start.engine, job.start.options, (vocabulary.END,)
    if any(cell.setting.selector == ORACLE for cell in job.start.cells):
        future = RecordedPrompts.load_all(job.oracle_data)
        return OracleGenerator(future, str(job.model), engine, options, stop)
    return OfflineGenerator(str(job.model), engine, options, stop)
