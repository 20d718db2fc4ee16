"""`flashmemory eval`: what a sparse KV cache costs in accuracy on a model of one's own, beside dense attention."""

import argparse
import sys
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.reference import reference_model_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flashmemory_vllm.cli.eval_servers import ServerChoice
    from flashmemory_vllm.evaluation.eval_rows import Side
    from flashmemory_vllm.evaluation.gate import Limits, Verdict

EXIT_GATE = 1
REFERENCE_CONFIG = Path("configs/reference.yaml")
# Enough for two of the longest requests of that file; without it vLLM takes most of the memory of a CPU's machine
REFERENCE_DENSE_BYTES = 1 << 29

# Option, type, default, metavar, help
_OPTIONS: tuple[tuple[str, Any, Any, str | None, str], ...] = (
    ("base-url", str, None, "URL", "running server with this backend. Default: start one"),
    ("dense-url", str, None, "URL", "running server with dense attention, stock vLLM. Default: start one"),
    ("dense-from", Path, None, "DIR", "take the dense rows of another evaluation of the model, ask no dense server"),
    ("served-model-name", str, None, "NAME", "name of the model at both servers. Default: --model"),
    ("tokenizer", str, None, "T", "folder or Hugging Face id. Default: --model"),
    ("config", Path, None, "FILE", "YAML file for vllm serve --config; the dense server gets it without our options"),
    ("additional-config", str, None, "JSON", "our options of the sparse server, as vllm serve takes them"),
    ("serve-args", str, None, "ARGS", "further arguments of vllm serve, for both servers"),
    ("dense-args", str, None, "ARGS", "the same for the dense server only"),
    ("sparse-args", str, None, "ARGS", "the same for the sparse server only"),
    ("startup-seconds", float, 1800.0, "S", "patience for a server to start"),
    ("suites", str, "parity,needles", "NAMES", "comma-separated: parity, loss, needles, ruler, longbench"),
    ("lengths", str, None, "LIST", "prompt tokens. Default: 16384,32768; of the shipped model 4096,8192,16384"),
    ("depths", int, 5, "N", "depths of the needles, evenly from 0 to 100 %%"),
    ("questions", int, 10, "N", "needles of each depth and length"),
    ("parity-prompts", int, 8, "N", "prompts of each length that both servers continue"),
    ("parity-tokens", int, 160, "N", "tokens to continue each by, at most"),
    ("loss-tokens", int, 256, "N", "tokens of text that both servers are forced along after each prompt"),
    ("documents", int, 64, "N", "windows of the texts, for the suite loss"),
    ("ruler-tasks", str, None, "NAMES", "comma-separated. Default: the six that need no download"),
    ("limit", int, 50, "N", "samples of each task and length of RULER, questions of LongBench"),
    ("longbench", Path, None, "FILE", "questions of LongBench v2, for the suite longbench"),
    ("longbench-tokens", int, None, "N", "cut longer prompts of LongBench to so many. Default: what the servers take"),
    ("concurrency", int, 8, "N", "requests at once; parity asks one by one"),
    ("seed", int, 0, "N", "of the questions"),
    ("min-relative", float, None, "X", "exit with 1 if a sparse score is below this share of the dense one"),
    (
        "max-loss",
        float,
        None,
        "X",
        "exit with 1 if the sparse loss is above the dense one by more nats a token",
    ),
    ("commit", str, None, "C", "commit to name in the rows, where git is not there to ask"),
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `eval` command."""
    parser = subparsers.add_parser("eval", help="accuracy of a model with this backend beside dense attention")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR", help="folder of rows and report; what has rows is kept")
    where.add_argument("--report", type=Path, metavar="DIR", help="write the report of such a folder, measure nothing")
    parser.add_argument("--model", help="folder or Hugging Face id. Default: the shipped model")
    for name, kind, default, metavar, text in _OPTIONS:
        told = text if default is None else f"{text}. Default: %(default)s"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=told)
    texts = "text files or JSON lines with a field text, for the suite loss"
    parser.add_argument("--texts", type=Path, nargs="+", metavar="FILE", help=texts)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure what the folder lacks, write the report, and judge."""
    from flashmemory_vllm.evaluation.eval_report import write_report
    from flashmemory_vllm.evaluation.gate import Limits

    if args.min_relative is not None and not 0 < args.min_relative <= 1:
        raise ConfigError(f"--min-relative is {args.min_relative}: allowed is a number > 0 and <= 1")
    if args.max_loss is not None and not isfinite(args.max_loss):
        raise ConfigError(f"--max-loss is {args.max_loss}: allowed is a finite number")
    folder: Path = args.out or args.report
    limits = Limits(args.min_relative, args.max_loss)
    if args.report is None:
        _measure(args)
    for path in write_report(folder, limits):
        print(path)
    return _judge(folder, limits)


def _measure(args: argparse.Namespace) -> None:
    from flashmemory_vllm.cli.eval_parts import make_parts
    from flashmemory_vllm.evaluation.eval_plot import check_installed
    from flashmemory_vllm.evaluation.eval_run import EvalRun, adopt_dense
    from flashmemory_vllm.evaluation.provenance import Provenance

    check_installed()
    model = args.model or str(reference_model_path())
    servers = choose_servers(args, model)
    provenance = Provenance.collect_elsewhere(["flashmemory", *sys.argv[1:]], args.commit)
    parts = make_parts(args, model, provenance)
    described = {side: server.description for side, server in servers.items()}
    if args.dense_from is not None:
        described["dense"] = adopt_dense(args.dense_from, args.out, model, described["sparse"])
    evaluation = EvalRun(args.out, model, described, provenance)
    if args.dense_from is not None and (lacking := evaluation.missing("dense", parts)):
        raise ConfigError(
            f"--dense-from: {args.dense_from} has no rows of {', '.join(part.name for part in lacking)} with these "
            "settings; allowed is what it has"
        )
    # One after the other, so that both find the device empty
    for side, server in servers.items():
        if evaluation.missing(side, parts):
            with server.running(args.out) as target:
                evaluation.run(target, parts)


def choose_servers(args: argparse.Namespace, model: str) -> "dict[Side, ServerChoice]":
    """The dense and the sparse server that the command line asks for, in the order in which they are asked.

    Raises:
        ConfigError: an option cannot be read, or is for a server that is not started here.
    """
    from flashmemory_vllm.cli.eval_servers import (
        ServerChoice,
        dense_config,
        read_config,
        sparse_config,
        split_arguments,
    )

    _check_used(args)
    is_shipped = Path(model).resolve() == reference_model_path().resolve()
    file = args.config or (REFERENCE_CONFIG if is_shipped else None)
    needed = args.base_url is None or args.dense_url is None
    config = read_config(file) if file is not None and needed else {}
    name = args.served_model_name or model
    both = split_arguments("--serve-args", args.serve_args)
    is_forced = "loss" in map(str.strip, args.suites.split(","))
    dense = ServerChoice(
        "dense",
        model,
        name,
        args.dense_url,
        dense_config(config, REFERENCE_DENSE_BYTES if is_shipped else None),
        [*both, *split_arguments("--dense-args", args.dense_args)],
        args.startup_seconds,
        is_forced,
    )
    sparse = ServerChoice(
        "sparse",
        model,
        name,
        args.base_url,
        sparse_config(config, args.additional_config),
        [*both, *split_arguments("--sparse-args", args.sparse_args)],
        args.startup_seconds,
        is_forced,
    )
    return {"dense": dense, "sparse": sparse}


def _check_used(args: argparse.Namespace) -> None:
    """An option for a server that runs already would do nothing."""
    if args.dense_from is not None and args.dense_url is not None:
        raise ConfigError("--dense-from: given with --dense-url; allowed is one of them")
    starts = {"dense": args.dense_url is None and args.dense_from is None, "sparse": args.base_url is None}
    options = {
        "config": any(starts.values()),
        "serve_args": any(starts.values()),
        "dense_args": starts["dense"],
        "sparse_args": starts["sparse"],
        "additional_config": starts["sparse"],
    }
    unused = [f"--{name.replace('_', '-')}" for name, used in options.items() if not used and getattr(args, name)]
    if unused:
        raise ConfigError(f"{', '.join(unused)}: given for a server that runs already; allowed without its URL")


def _judge(folder: Path, limits: "Limits") -> int:
    """Print what there is to judge by; the exit code."""
    from flashmemory_vllm.evaluation.eval_rows import load_evaluation
    from flashmemory_vllm.evaluation.gate import judge, passes, unjudged, verdicts
    from flashmemory_vllm.evaluation.loss import loss_lines

    evaluation = load_evaluation(folder)
    assert evaluation is not None
    found = verdicts(evaluation, limits)
    for line in judge(evaluation):
        relative = "" if line.relative is None else f", {line.relative:.3f} of it"
        _tell(line.name, f"dense {line.dense:.3f}, sparse {line.sparse:.3f}{relative}", found)
    for loss in loss_lines(evaluation):
        error = "" if loss.stderr is None else f", standard error {loss.stderr:.4f}"
        _tell(loss.name, f"dense {loss.dense:.4f} nats a token, sparse {loss.gap:+.4f} of it{error}", found)
    if passes(evaluation, limits):
        return 0
    failed = [name for name, verdict in found.items() if verdict == "fail"]
    told = [f"asked is {limits.told}: {', '.join(failed)}"] if failed else []
    told += [f"no line is both sparse and answered for {limit.told}" for limit in unjudged(evaluation, limits)]
    print(f"gate failed, {'; '.join(told)}", file=sys.stderr)
    return EXIT_GATE


def _tell(name: str, figures: str, verdicts: "Mapping[str, Verdict]") -> None:
    verdict = f": {verdicts[name]}" if name in verdicts else ""
    print(f"{name}: {figures}{verdict}")
