"""`flashmemory accuracy`: what each selector costs in exact match, in one engine and one resumable file."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args

from flashmemory_vllm.config import SelectorName
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.reference import reference_model_path

if TYPE_CHECKING:
    from flashmemory_vllm.evaluation.accuracy import AccuracyPlan

T = TypeVar("T")
NEURAL = "neural"
# Shorter prompts keep every block.
MIN_SPARSE_TOKENS = 2048

DEFAULT_LENGTHS = "4096,16384,32768"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `accuracy` command."""
    parser = subparsers.add_parser("accuracy", help="exact match of each selector, task and prompt length")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the rows; cells in it are kept")
    parser.add_argument("--model", type=Path, default=reference_model_path(), help="folder. Default: the shipped model")
    parser.add_argument(
        "--selectors",
        default=",".join(name for name in get_args(SelectorName) if name != NEURAL),
        help="comma-separated; full is dense attention, neural needs --indexer. Default: %(default)s",
    )
    parser.add_argument("--indexer", help="trained indexer, for the selector neural: file, folder or Hugging Face id")
    parser.add_argument("--tasks", help="comma-separated. Default: all")
    parser.add_argument(
        "--tokens", default=DEFAULT_LENGTHS, help="prompt tokens, comma-separated. Default: %(default)s"
    )
    parser.add_argument("--questions", type=int, default=200, help="questions of each cell. Default: 200")
    parser.add_argument(
        "--questions-per-context", type=int, default=20, help="questions that share a context. Default: 20"
    )
    parser.add_argument("--ratio", type=float, default=0.135, help="resident ratio. Default: 0.135")
    parser.add_argument("--tau", type=int, default=16, help="decode steps between selections. Default: 16")
    parser.add_argument("--groups", type=int, default=1, help="layer groups. Default: 1")
    parser.add_argument("--anchor-layers", help="layers that feed the selector. Default: three, in the middle third")
    parser.add_argument("--batch", type=int, default=64, help="requests that run at once. Default: 64")
    parser.add_argument("--block-size", type=int, default=16, help="tokens in a KV block. Default: 16")
    parser.add_argument("--dtype", default="auto", help="dtype of the model. Default: auto")
    parser.add_argument("--eager", action="store_true", help="no compilation and no CUDA graphs")
    parser.add_argument("--gpu-memory-bytes", type=int, help="device memory for KV. Default: vLLM's share")
    parser.add_argument("--host-memory-gib", type=float, help="GiB of host memory for KV. Default: half")
    parser.add_argument("--commit", help="commit to name in the rows, where git is not there to ask")
    parser.add_argument("--table", action="store_true", help="print the tables of the rows there are, measure nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure what the file lacks, then print the tables."""
    from flashmemory_vllm.evaluation import vocabulary
    from flashmemory_vllm.evaluation.accuracy import AccuracyRun
    from flashmemory_vllm.evaluation.accuracy_rows import format_tables, load_rows
    from flashmemory_vllm.evaluation.provenance import Provenance

    if args.table:
        print(format_tables(load_rows(args.out)))
        return 0
    from flashmemory_vllm.plugin.offline import OfflineGenerator

    plan = make_plan(args)
    if not (args.model / "config.json").is_file():
        raise ConfigError(f"--model is {args.model}: it has no config.json, allowed is the folder of a model")
    with OfflineGenerator(
        str(args.model), engine_arguments(args, plan), start_options(args, plan), (vocabulary.END,)
    ) as generator:
        provenance = Provenance.collect(["flashmemory", *sys.argv[1:]], args.commit)
        rows = AccuracyRun(generator, plan, args.model.name, args.block_size, provenance, args.out).run()
    print(format_tables(rows))
    return 0


def make_plan(args: argparse.Namespace) -> "AccuracyPlan":
    """What the command line asks for.

    Raises:
        ConfigError: a list has an unknown or malformed item, or a number is out of range.
    """
    from flashmemory_vllm.evaluation.accuracy import AccuracyPlan, settings_of
    from flashmemory_vllm.evaluation.tasks import TASK_NAMES

    for option in ("questions", "questions_per_context", "batch"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} is {getattr(args, option)}: allowed is 1 or more")
    selectors = _choices("--selectors", args.selectors, {name: name for name in get_args(SelectorName)})
    if (NEURAL in selectors) != (args.indexer is not None):
        raise ConfigError(
            f"--indexer is {args.indexer!r} and --selectors is {args.selectors!r}: allowed is an indexer with the "
            f"selector {NEURAL}, and with no other"
        )
    tasks = _choices("--tasks", args.tasks or ",".join(TASK_NAMES), {name: name for name in TASK_NAMES})
    anchors = None if args.anchor_layers is None else _numbers("--anchor-layers", args.anchor_layers, smallest=0)
    return AccuracyPlan(
        settings=settings_of(selectors, args.tau, args.ratio, args.groups, anchors, args.indexer),
        tasks=tasks,
        lengths=_numbers("--tokens", args.tokens),
        num_questions=args.questions,
        questions_per_context=args.questions_per_context,
    )


def engine_arguments(args: argparse.Namespace, plan: "AccuracyPlan") -> dict[str, object]:
    """Arguments of `vllm.LLM`: room for the longest prompt with the longest answer, and no more."""
    from flashmemory_vllm.evaluation.tasks import ANSWER_LENS

    arguments: dict[str, object] = {
        "max_model_len": max(plan.lengths) + max(ANSWER_LENS[task] for task in plan.tasks),
        "max_num_seqs": args.batch,
        "block_size": args.block_size,
        "dtype": args.dtype,
        "enforce_eager": args.eager,
        "enable_prefix_caching": True,
    }
    if args.gpu_memory_bytes is not None:
        arguments["kv_cache_memory_bytes"] = args.gpu_memory_bytes
        # vLLM refuses to start when less than this share of the device is free, though the size is given.
        arguments["gpu_memory_utilization"] = 0.1
    return arguments


def start_options(args: argparse.Namespace, plan: "AccuracyPlan") -> dict[str, object]:
    """Our options at start: the largest of each budget, since the scheduler keeps to them for good.

    `exact` is started with if it is asked for: its index takes the most device memory, so that what the start
    leaves for slots is right for all.
    """
    settings = sorted(plan.settings, key=lambda setting: setting.selector != "exact")
    options = settings[0].options() | {
        "resident_ratio": max(setting.ratio for setting in settings),
        # Accuracy is to be measured at lengths, too, at which a small model gains nothing
        "min_sparse_tokens": MIN_SPARSE_TOKENS,
    }
    if args.host_memory_gib is not None:
        options["host_memory_gib"] = args.host_memory_gib
    return options


def _choices(option: str, text: str, allowed: Mapping[str, T]) -> tuple[T, ...]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise ConfigError(f"{option} has {', '.join(map(repr, unknown))}: allowed is {', '.join(allowed)}")
    return tuple(allowed[name] for name in dict.fromkeys(names))


def _numbers(option: str, text: str, smallest: int = 1) -> tuple[int, ...]:
    try:
        numbers = sorted({int(number) for number in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < smallest:
        raise ConfigError(f"{option} is {text!r}: allowed are integers from {smallest} up, separated by commas")
    return tuple(numbers)
