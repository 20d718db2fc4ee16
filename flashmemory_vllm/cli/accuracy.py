"""`flashmemory accuracy`: what each selector costs in accuracy, cell by cell, in one resumable file."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from flashmemory_vllm.cli.block_size import add_block_size, block_size_of
from flashmemory_vllm.config import SelectorName
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.reference import reference_model_path

if TYPE_CHECKING:
    from flashmemory_vllm.cli.accuracy_starts import Start
    from flashmemory_vllm.evaluation.accuracy import Cell, Conditions
    from flashmemory_vllm.evaluation.accuracy_plan import CellGroup
    from flashmemory_vllm.evaluation.accuracy_rows import Setting
    from flashmemory_vllm.runtime.shape import AttentionShape

T = TypeVar("T")
DENSE, NEURAL, ORACLE = "full", "neural", "oracle"
UNTRAINED = ",".join(name for name in get_args(SelectorName) if name != NEURAL)

# What a plan says instead: option, default, help
_CELL_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("selectors", UNTRAINED, "comma-separated; full is dense attention, neural and oracle need what is named below"),
    ("tasks", None, "comma-separated. Default: all that the model was trained on; path and latepath are the others"),
    ("tokens", "4096,16384,32768", "prompt tokens, comma-separated"),
    ("questions", 200, "questions of each cell"),
    ("ratio", 0.135, "resident ratio, with the index keys on top"),
    ("device-share", None, "share of a request's bytes on the device, index keys included, instead of a ratio"),
    ("tau", None, "decode steps between selections. Default: what suits the selector"),
    ("groups", 1, "layer groups"),
    ("anchor-layers", None, "layers that feed the selector. Default: three, in the middle third"),
    ("score-threshold", None, "score below which a block gets no slot. Default: the selector's own"),
    ("fallback-share", None, "selected share above which a request keeps all its blocks. Default: never"),
    ("batch", 64, "requests that run at once"),
)
_NUMBERS = dict.fromkeys(("ratio", "device-share", "score-threshold", "fallback-share"), float) | dict.fromkeys(
    ("questions", "tau", "groups", "batch"), int
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `accuracy` command."""
    parser = subparsers.add_parser("accuracy", help="accuracy of each selector, task and prompt length")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the rows; cells in it are kept")
    parser.add_argument(
        "--plan", type=Path, help="YAML file of cells, see configs/accuracy, instead of the next twelve"
    )
    for name, default, text in _CELL_OPTIONS:
        told = text if default is None else f"{text}. Default: {default}"
        parser.add_argument(f"--{name}", type=_NUMBERS.get(name, str), help=told)
    parser.add_argument("--model", type=Path, default=reference_model_path(), help="folder. Default: the shipped model")
    parser.add_argument("--indexer", help="trained indexer, for the selector neural: file, folder or Hugging Face id")
    parser.add_argument(
        "--oracle-data", help="captures of these questions, for the selector oracle: folders, comma-separated"
    )
    parser.add_argument(
        "--questions-per-context", type=int, default=20, help="questions that share a context. Default: 20"
    )
    add_block_size(parser)
    parser.add_argument("--dtype", default="auto", help="dtype of the model. Default: auto")
    parser.add_argument("--eager", action="store_true", help="no compilation and no CUDA graphs: one engine for all")
    parser.add_argument("--gpu-memory-bytes", type=int, help="device memory for KV. Default: vLLM's share")
    parser.add_argument("--host-memory-gib", type=float, help="GiB of host memory for KV. Default: half")
    parser.add_argument("--time-limit", type=float, metavar="S", help="begin no cell after so many seconds")
    parser.add_argument("--commit", help="commit to name in the rows, where git is not there to ask")
    parser.add_argument("--table", action="store_true", help="print the tables of the rows there are, measure nothing")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="folder for pictures of the rows; needs matplotlib")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure what the file lacks, then print the tables and draw."""
    from flashmemory_vllm.evaluation.accuracy_rows import format_report, load_rows

    if not args.table:
        _measure(args)
    rows = load_rows(args.out)
    print(format_report(rows))
    if args.plot is not None:
        from flashmemory_vllm.evaluation.accuracy_plot import plot_rows

        print(*plot_rows(rows, args.plot), sep="\n")
    return 0


def _measure(args: argparse.Namespace) -> None:
    from flashmemory_vllm.cli.accuracy_starts import Job, measure
    from flashmemory_vllm.evaluation.accuracy import Conditions, note_unaffordable
    from flashmemory_vllm.evaluation.accuracy_rows import load_rows
    from flashmemory_vllm.evaluation.provenance import Provenance

    began = time.monotonic()
    if args.time_limit is not None and args.time_limit <= 0:
        raise ConfigError(f"--time-limit is {args.time_limit}: allowed is a number > 0")
    deadline = None if args.time_limit is None else began + args.time_limit
    cells = make_cells(args)
    shape = read_shape(args)
    conditions = Conditions(
        args.model.name, shape.block_size, args.questions_per_context, block_bytes=shape.block_bytes
    )
    missing = conditions.missing(cells, load_rows(args.out))
    folders = [Path(folder) for folder in (args.oracle_data or "").split(",") if folder]
    command = ["flashmemory", *sys.argv[1:]]
    missing = note_unaffordable(
        missing, conditions, partial(Provenance.collect_elsewhere, command, args.commit), args.out
    )
    check_recorded(missing, conditions, folders)
    for start in make_starts(args, missing):
        if deadline is None or time.monotonic() < deadline:
            measure(Job(args.model, start, conditions, folders, args.out, command, args.commit, deadline))
    left = conditions.missing(cells, load_rows(args.out))
    if left:
        print(f"{len(left)} of {len(cells)} cells are left; the same command goes on with them", file=sys.stderr)


def make_cells(args: argparse.Namespace) -> "list[Cell]":
    """What the command line or its plan asks for.

    Raises:
        ConfigError: a list has an unknown or malformed item, a number is out of range, or a plan is not alone.
    """
    from flashmemory_vllm.evaluation.accuracy_plan import cells_of, load_plan

    if args.questions_per_context < 1:
        raise ConfigError(f"--questions-per-context is {args.questions_per_context}: allowed is 1 or more")
    given = {name: getattr(args, name.replace("-", "_")) for name, _, _ in _CELL_OPTIONS}
    beside = [f"--{name}" for name, value in given.items() if value is not None]
    if args.plan is not None:
        if beside:
            raise ConfigError(f"{', '.join(beside)}: given with --plan; allowed is one of them")
        return cells_of(load_plan(args.plan).cells, args.indexer, partial(_fit, args))
    defaults = {name: default for name, default, _ in _CELL_OPTIONS}
    chosen = {name: defaults[name] if value is None else value for name, value in given.items()}
    if given["ratio"] is not None and given["device-share"] is not None:
        raise ConfigError(f"--device-share is {given['device-share']}: given with --ratio; allowed is one of them")
    group = _group(chosen)
    if (NEURAL in group.selectors) != (args.indexer is not None):
        raise ConfigError(
            f"--indexer is {args.indexer!r} and --selectors is {chosen['selectors']!r}: allowed is an indexer with the "
            f"selector {NEURAL}, and with no other"
        )
    return cells_of([group], args.indexer, partial(_fit, args))


def _fit(args: argparse.Namespace, setting: "Setting") -> float:
    """The resident ratio that the share of the device's bytes leaves a setting."""
    from flashmemory_vllm.cli.accuracy_starts import index_bytes
    from flashmemory_vllm.evaluation.device_share import ratio_for_share

    assert setting.device_share is not None
    shape = read_shape(args)
    return ratio_for_share(setting.device_share, index_bytes(setting, shape), shape.block_bytes)


def _group(chosen: Mapping[str, Any]) -> "CellGroup":
    from flashmemory_vllm.evaluation.accuracy_plan import CellGroup
    from flashmemory_vllm.evaluation.questions import ALL_TASK_NAMES
    from flashmemory_vllm.evaluation.tasks import TASK_NAMES, AnyTaskName

    _check_numbers(chosen)
    selectors = {name: name for name in (*get_args(SelectorName), ORACLE)}
    tasks: dict[str, AnyTaskName] = {name: name for name in ALL_TASK_NAMES}
    layers, share = chosen["anchor-layers"], chosen["device-share"]
    sizes: dict[str, Any] = {"ratios": [chosen["ratio"]]} if share is None else {"device_shares": [share]}
    return CellGroup(
        selectors=_choices("--selectors", chosen["selectors"], selectors),
        tasks=_choices("--tasks", chosen["tasks"] or ",".join(TASK_NAMES), tasks),
        tokens=_numbers("--tokens", chosen["tokens"]),
        taus=[chosen["tau"]],
        groups=[chosen["groups"]],
        anchor_layers=[None if layers is None else _numbers("--anchor-layers", layers, smallest=0)],
        score_thresholds=[chosen["score-threshold"]],
        fallback_shares=[chosen["fallback-share"]],
        batches=[chosen["batch"]],
        questions=chosen["questions"],
        **sizes,
    )


def _check_numbers(chosen: Mapping[str, Any]) -> None:
    for name in ("questions", "tau", "groups", "batch"):
        if chosen[name] is not None and chosen[name] < 1:
            raise ConfigError(f"--{name} is {chosen[name]}: allowed is 1 or more")
    for name in ("ratio", "device-share"):
        if chosen[name] is not None and not 0 < chosen[name] <= 1:
            raise ConfigError(f"--{name} is {chosen[name]}: allowed is a number > 0 and <= 1")
    threshold, fallback = chosen["score-threshold"], chosen["fallback-share"]
    if threshold is not None and threshold < 0:
        raise ConfigError(f"--score-threshold is {threshold}: allowed is a number >= 0")
    if fallback is None:
        return
    if not 0 <= fallback <= 1:
        raise ConfigError(f"--fallback-share is {fallback}: allowed is a number >= 0 and <= 1")
    if threshold is None and set(chosen["selectors"].split(",")) - {DENSE, NEURAL}:
        raise ConfigError(
            f"--fallback-share is {fallback} and --selectors is {chosen['selectors']!r}: allowed is --score-threshold "
            f"beside it, or the selector {NEURAL} alone"
        )


def check_recorded(cells: "Sequence[Cell]", conditions: "Conditions", folders: Sequence[Path]) -> None:
    """See that the oracle knows every question that it will be asked.

    Raises:
        ConfigError: it does not; the message has the commands that record what is missing.
    """
    asked = [cell for cell in cells if cell.setting.selector == ORACLE]
    if not asked:
        return
    from flashmemory_vllm.plugin.recorded_prompts import RecordedPrompts

    recorded = RecordedPrompts.load_all(folders) if folders else None
    if recorded is not None and recorded.block_size != conditions.block_size:
        raise ConfigError(
            f"--oracle-data: recorded in blocks of {recorded.block_size} tokens, --block-size is "
            f"{conditions.block_size}; allowed is the same"
        )
    unknown: dict[tuple[int, int], list[str]] = {}
    for task, tokens, questions in dict.fromkeys((cell.task, cell.tokens, cell.questions) for cell in asked):
        samples = conditions.samples(task, tokens, questions)
        if recorded is None or not all(recorded.knows(sample.prompt_ids.tolist()) for sample in samples):
            unknown.setdefault((questions, tokens), []).append(task)
    if unknown:
        commands = "; ".join(
            f"flashmemory capture --out DIR --layer-mass --accuracy-questions {questions} --tokens {tokens} "
            f"--block-size {conditions.block_size}"
            for questions, tokens in unknown
        )
        names = "; ".join(
            f"{questions} questions of {', '.join(tasks)} at {tokens:,} tokens"
            for (questions, tokens), tasks in unknown.items()
        )
        raise ConfigError(f"--oracle-data: not recorded are {names}; what records them: {commands}")


def read_shape(args: argparse.Namespace) -> "AttentionShape":
    """Sizes of the model's attention layers.

    Raises:
        ConfigError: the model's configuration cannot be read, or this machine cannot serve blocks of the size given.
    """
    from flashmemory_vllm.cli.plan import model_sizes, read_model_fields

    if not (args.model / "config.json").is_file():
        raise ConfigError(f"--model is {args.model}: it has no config.json, allowed is the folder of a model")
    return model_sizes(read_model_fields(str(args.model)), args.dtype).shape(block_size_of(args))


def make_starts(args: argparse.Namespace, cells: "Sequence[Cell]") -> "list[Start]":
    """The engines that the cells need.

    Raises:
        ConfigError: the model's configuration cannot be read, or a setting does not fit it.
    """
    from flashmemory_vllm.cli.accuracy_starts import EngineChoices, plan_starts

    shape = read_shape(args)
    choices = EngineChoices(shape.block_size, args.dtype, args.eager, args.gpu_memory_bytes, args.host_memory_gib)
    return plan_starts(cells, shape, choices)


def _choices(option: str, text: str, allowed: Mapping[str, T]) -> list[T]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise ConfigError(f"{option} has {', '.join(map(repr, unknown))}: allowed is {', '.join(allowed)}")
    return [allowed[name] for name in dict.fromkeys(names)]


def _numbers(option: str, text: str, smallest: int = 1) -> list[int]:
    try:
        numbers = sorted({int(number) for number in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < smallest:
        raise ConfigError(f"{option} is {text!r}: allowed are integers from {smallest} up, separated by commas")
    return numbers
