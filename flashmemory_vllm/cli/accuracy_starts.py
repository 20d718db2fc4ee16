"""The engines behind `flashmemory accuracy`: which cells share one, how it starts, and the process it runs in."""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from flashmemory_vllm import errors
from flashmemory_vllm.config import SECTION, FlashMemoryConfig
from flashmemory_vllm.errors import FlashMemoryError
from flashmemory_vllm.evaluation.accuracy import Cell, Conditions
from flashmemory_vllm.evaluation.accuracy_plan import ORACLE
from flashmemory_vllm.evaluation.accuracy_rows import Setting
from flashmemory_vllm.evaluation.questions import answer_len
from flashmemory_vllm.files import write_text
from flashmemory_vllm.processes.guarded import GuardedProcess

if TYPE_CHECKING:
    from flashmemory_vllm.runtime.shape import AttentionShape

WORKER_MODULE = "flashmemory_vllm.cli.accuracy_worker"
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

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_bytes(TypeAdapter(Job).dump_json(self))

    @classmethod
    def read(cls, path: Path) -> "Job":
        """Read what `write` wrote."""
        return TypeAdapter(Job).validate_json(path.read_bytes())


def index_bytes(setting: Setting, shape: "AttentionShape") -> int:
    """Device bytes of a block's index keys under a setting.

    Raises:
        ConfigError: the setting is not allowed for this model, or its indexer cannot be read or does not fit.
    """
    from flashmemory_vllm.runtime.beside import index_bytes_per_block

    # The oracle has no index, and none can be made here
    return 0 if setting.selector == ORACLE else index_bytes_per_block(_config(setting), shape)


def _config(setting: Setting) -> FlashMemoryConfig:
    return FlashMemoryConfig.from_additional_config({SECTION: setting.all_options()})


def plan_starts(cells: Sequence[Cell], shape: "AttentionShape", choices: EngineChoices) -> list[Start]:
    """Split cells between two engines at most.

    Captured CUDA graphs write so many queries of certain layers for certain layer groups. Most cells agree in these;
    those that do not share an engine without graphs, which starts faster than one for each.

    Args:
        cells: what to measure.
        shape: the model's attention layers.
        choices: how engines are started.

    Raises:
        ConfigError: a setting is not allowed for this model, or its indexer cannot be read or does not fit.
    """
    from flashmemory_vllm.runtime.trained import anchor_layers, num_kept

    bytes_of: dict[Setting, int] = {}
    by_graphs: dict[object, list[Cell]] = {}
    for cell in cells:
        config = _config(cell.setting)
        key = (config.layer_groups, anchor_layers(config, shape), num_kept(config))
        by_graphs.setdefault(key, []).append(cell)
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
    options = largest.all_options() | {
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
    with tempfile.TemporaryDirectory(prefix="flashmemory-accuracy-") as folder:
        told, refused = Path(folder) / "job.json", Path(folder) / "error.json"
        job.write(told)
        with GuardedProcess([sys.executable, "-m", WORKER_MODULE, str(told), str(refused)]) as process:
            code = process.wait()
        if refused.exists():
            raise read_error(refused)
    if code:
        raise FlashMemoryError(f"the engine's process ended with {code}; its log is above")


def write_error(path: Path, error: FlashMemoryError) -> None:
    """Tell another process of an error."""
    write_text(path, json.dumps([type(error).__name__, str(error)]))


def read_error(path: Path) -> FlashMemoryError:
    """The error that `write_error` told of."""
    name, message = json.loads(path.read_text(encoding="utf-8"))
    kind: type[FlashMemoryError] = getattr(errors, name)
    return kind(message)
