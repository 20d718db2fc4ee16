"""`flashmemory soak`: a long run of random requests, everything it wrote compared, everything it held given back."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.files import write_text
from flashmemory_vllm.reference import reference_indexer_path, reference_model_path
from flashmemory_vllm.soak.judge import count_right
from flashmemory_vllm.soak.process import HANG_MARK, Job, SoakFolder, run_worker, worker_environment
from flashmemory_vllm.soak.report import Cell, format_report, make_row
from flashmemory_vllm.soak.rows import SoakRow, load_rows, save_rows
from flashmemory_vllm.soak.settings import PHASES, RUNNERS, SCHEDULING, Device, SoakSettings, default_settings
from flashmemory_vllm.soak.trace import Trace, draw_trace

Name = TypeVar("Name", bound=str)

# Of the shipped indexer: it answers as dense attention in the long run, and a slip is a slip. Others know no floor.
SHIPPED_FLOOR = 0.9
REFERENCE_GIB: dict[Device, float] = {"cpu": 1.0, "cuda": 16.0}
# What a trace is drawn by, and so what a trace that is played again has decided: option and default, None by device
DRAWN: dict[str, Any] = {
    "requests": 200,
    "phases": ",".join(PHASES),
    "runners": "v1",
    "scheduling": "sync",
    "overcommit": 10.0,
    "seed": 0,
    **dict.fromkeys(("dtype", "ratio", "selector", "adapters", "max_loras", "prompt_tokens", "output_tokens")),
    **dict.fromkeys(("contexts", "eager")),
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `soak` command."""
    parser = subparsers.add_parser("soak", help="load an engine for long, compare every text, look for what leaks")
    parser.add_argument("--seconds", type=float, default=120.0, help="of all cells together. Default: 120")
    parser.add_argument("--requests", type=int, help="of all cells together, at most. Default: 200")
    parser.add_argument("--phases", help=f"comma-separated. Default: {DRAWN['phases']}")
    parser.add_argument("--runners", help="comma-separated model runners, v1 and v2. Default: v1")
    parser.add_argument("--scheduling", help="comma-separated, sync and async. Default: sync")
    parser.add_argument("--overcommit", type=float, help="host blocks for each device slot. Default: 10")
    parser.add_argument("--seed", type=int, help="of the first cell; others count on. Default: 0")
    parser.add_argument("--model", help="folder of a model. Default: the shipped one")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="Default: as suits the device")
    parser.add_argument("--ratio", type=float, help="resident ratio of the sparse phase. Default: 0.135, on a CPU 0.4")
    parser.add_argument("--selector", help="of the sparse phase. Default: the shipped trained indexer")
    parser.add_argument("--floor", type=float, help=f"share of right answers. Default: {SHIPPED_FLOOR}, or 0 elsewhere")
    parser.add_argument("--adapters", type=int, help="LoRA adapters of the dense phase. Default: 2")
    parser.add_argument("--max-loras", type=int, help="adapters of one batch; fewer are swapped. Default: all")
    parser.add_argument("--prompt-tokens", type=int, nargs=2, metavar=("LEAST", "MOST"), help="Default: by device")
    parser.add_argument("--output-tokens", type=int, nargs=2, metavar=("LEAST", "MOST"), help="Default: by device")
    parser.add_argument("--contexts", type=int, help="contexts that prompts share. Default: by device")
    parser.add_argument(
        "--eager", action="store_true", default=None, help="no compilation and no CUDA graphs. Default on a CPU"
    )
    parser.add_argument("--triton-cpu", type=Path, metavar="FOLDER", help="Triton backend for v2 without CUDA")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; each cell appends a row")
    parser.add_argument("--report", type=Path, help="Markdown file of all rows of --out")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keeps traces, texts and logs. Default: none")
    parser.add_argument("--replay", type=Path, metavar="TRACE", help="play this trace instead of drawing one")
    parser.add_argument("--commit", help="commit to name in the rows, where git is not there to ask")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run every cell, one after the other; 1 if a row has a problem."""
    import torch

    rows = load_rows(args.out)
    if args.report is not None:  # or it would be missing after all the work
        args.report.parent.mkdir(parents=True, exist_ok=True)
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    traces = [read_trace(args, device)] if args.replay else [draw_trace(one) for one in read_settings(args, device)]
    provenance = Provenance.collect_elsewhere(["flashmemory", *sys.argv[1:]], args.commit)
    args.seconds_each = args.seconds / len(traces)
    new: list[SoakRow] = []
    with tempfile.TemporaryDirectory(prefix="flashmemory-soak-") as temporary:
        for index, trace in enumerate(traces):
            folder = SoakFolder((args.keep or Path(temporary)) / _name(trace.settings, index))
            row = _run_cell(args, folder, trace, device, provenance)
            new.append(row)
            save_rows(args.out, [*rows, *new])
            print(format_report([row]), flush=True)
    if args.report is not None:
        write_text(args.report, format_report([*rows, *new]))
    for row in new:
        for problem in row.problems():
            print(f"{row.phase} {row.runner} {'async' if row.is_async else 'sync'}: {problem}", file=sys.stderr)
    return int(any(row.problems() for row in new))


def read_trace(args: argparse.Namespace, device: Device) -> Trace:
    """The trace to be played again.

    Raises:
        ConfigError: it cannot be read, needs what is not there, or an option is given that it has decided.
    """
    if decided := [name for name in DRAWN if getattr(args, name) is not None]:
        told = ", ".join(f"--{name.replace('_', '-')}" for name in decided)
        raise ConfigError(f"{told}: given with --replay, whose trace decides that; allowed is one of them")
    _check_seconds(args)
    trace = Trace.load(args.replay)
    _check_runners(f"--replay: {args.replay}", [trace.settings.runner], args, device)
    return trace


def read_settings(args: argparse.Namespace, device: Device) -> list[SoakSettings]:
    """Settings of each cell: every phase on every runner with every scheduling.

    Raises:
        ConfigError: a name is unknown, or a number is not allowed.
    """
    chosen = {name: default if getattr(args, name) is None else getattr(args, name) for name, default in DRAWN.items()}
    args = argparse.Namespace(**{**vars(args), **chosen})
    _check_seconds(args)
    if args.requests <= 0:
        raise ConfigError(f"--requests is {args.requests}: allowed is a number > 0")
    runners = _names("--runners", args.runners, RUNNERS)
    _check_runners("--runners", runners, args, device)
    cells = [
        (phase, runner, scheduling == "async")
        for runner in runners
        for scheduling in _names("--scheduling", args.scheduling, SCHEDULING)
        for phase in _names("--phases", args.phases, PHASES)
    ]
    return [
        default_settings(
            device,
            phase,
            runner,
            is_async=is_async,
            overcommit=args.overcommit,
            seed=args.seed + index,
            num_requests=max(1, args.requests // len(cells)),
            dtype=args.dtype,
            resident_ratio=args.ratio,
            selector=args.selector,
            adapters=args.adapters,
            max_loras=args.max_loras,
            prompt_tokens=args.prompt_tokens and tuple(args.prompt_tokens),
            output_tokens=args.output_tokens and tuple(args.output_tokens),
            num_contexts=args.contexts,
            is_eager=args.eager,
        )
        for index, (phase, runner, is_async) in enumerate(cells)
    ]


def _check_seconds(args: argparse.Namespace) -> None:
    if not args.seconds > 0:
        raise ConfigError(f"--seconds is {args.seconds}: allowed is a number > 0")


def _check_runners(source: str, runners: Sequence[str], args: argparse.Namespace, device: Device) -> None:
    if device == "cpu" and "v2" in runners and args.triton_cpu is None:
        raise ConfigError(f"{source} has v2 and there is no CUDA: allowed with --triton-cpu FOLDER")


def _names(option: str, text: str, known: Sequence[Name]) -> list[Name]:
    chosen = [name.strip() for name in text.split(",")]
    if unknown := [name for name in chosen if name not in known]:
        raise ConfigError(f"{option} has {', '.join(map(repr, unknown))}: allowed is {', '.join(known)}")
    return [name for name in known if name in chosen]


def _run_cell(
    args: argparse.Namespace, folder: SoakFolder, trace: Trace, device: Device, provenance: Provenance
) -> SoakRow:
    """Serve a trace, judge what came of it, and make a row."""
    settings = trace.settings
    model = args.model or str(reference_model_path())
    indexer = str(reference_indexer_path()) if settings.uses_shipped_indexer else None
    folder.begin(trace)
    folder.write("job", asdict(Job(model, indexer, args.seconds_each, REFERENCE_GIB[device], device)))
    error = run_worker(folder, "serve", worker_environment(settings, device, "serve", args.triton_cpu))
    has_hung = error is not None and HANG_MARK in error
    if error is None and settings.phase == "dense":
        error = run_worker(folder, "judge", worker_environment(settings, device, "judge", args.triton_cpu))
    texts = folder.texts()
    floor = args.floor if args.floor is not None else SHIPPED_FLOOR if settings.uses_shipped_indexer else 0.0
    return make_row(
        Cell(settings, Path(model).name, floor, provenance),
        folder.read("outcome"),
        folder.read("verdict"),
        (len(texts), count_right(trace, texts)),
        error,
        has_hung=has_hung,
    )


def _name(settings: SoakSettings, index: int) -> str:
    return f"{index}-{settings.phase}-{settings.runner}-{'async' if settings.is_async else 'sync'}"
