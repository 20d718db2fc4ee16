"""`flashmemory bench`: stock vLLM and our backend on the same loads, one row for each."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from flashmemory_vllm.benchmark.scenario import EngineName, load_scenario
from flashmemory_vllm.cli import bench_serving
from flashmemory_vllm.cli.bench_choices import check_names, chosen_names, model_arguments
from flashmemory_vllm.cli.shapes import SHAPES, shape_label
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.provenance import Provenance

if TYPE_CHECKING:
    from flashmemory_vllm.benchmark.cells import Cell
    from flashmemory_vllm.benchmark.rows import BenchRow

DEFAULT_ENGINES = "stock,flashmemory"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `bench` command."""
    parser = subparsers.add_parser("bench", help="time stock vLLM and this backend on the same loads")
    parser.add_argument("scenarios", nargs="*", type=Path, metavar="SCENARIO", help="YAML files, see configs/bench")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="folder or Hugging Face id. Default: the shipped model")
    model.add_argument("--shape", choices=tuple(SHAPES), help="a model of these sizes with random weights")
    parser.add_argument("--layers", type=int, metavar="N", help="the first N layers of --shape. Default: all")
    parser.add_argument(
        "--engines",
        help=f"comma-separated, also offload and ideal. Default: {DEFAULT_ENGINES}; of serving scenarios, also fp8 and "
        "not ideal, what they say",
    )
    parser.add_argument(
        "--only", metavar="NAMES", help="comma-separated SCENARIO/MEASUREMENT or SCENARIO/LOAD. Default: all there are"
    )
    parser.add_argument("--out", type=Path, help="JSON file; every row is written as soon as it is measured")
    parser.add_argument("--resume", action="store_true", help="go on with --out: what has a row is not measured again")
    parser.add_argument("--time-limit", type=float, metavar="S", help="begin no measurement after so many seconds")
    parser.add_argument(
        "--startup-seconds",
        type=float,
        default=1800.0,
        metavar="S",
        help="patience for an engine. Default: %(default)s",
    )
    parser.add_argument("--log", type=Path, help="file that the engines' logs are appended to. Default: none")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="replace a field of the scenarios, such as engine.max_num_seqs=8; may be given again",
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="picture of the rows; needs matplotlib")
    parser.add_argument("--replot", type=Path, metavar="ROWS", help="plot the rows of a file, measure nothing")
    parser.add_argument("--table", type=Path, metavar="ROWS", help="print the rows of a file, measure nothing")
    parser.add_argument("--commit", help="commit to name in the rows, where git is not there to ask")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables and plot; or only print or plot what there is."""
    from flashmemory_vllm.benchmark.rows import format_tables

    _check_arguments(args)
    if bench_serving.is_asked_for(args):
        print(bench_serving.run(args))
        return 0
    rows = _old_rows(args) if args.table or args.replot else _measure(args)
    if not args.replot:
        print(format_tables(rows))
    if args.plot is not None:
        from flashmemory_vllm.benchmark.plot import plot_rows

        plot_rows(rows, args.plot)
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    given = [name for name in ("scenarios", "table", "replot") if getattr(args, name)]
    if len(given) != 1:
        told = " and ".join(given) or "nothing"
        raise ConfigError(f"bench got {told}: allowed is one of SCENARIO, --table ROWS and --replot ROWS")
    if args.scenarios and args.out is None:
        raise ConfigError("--out is not given: allowed is a file for the rows")
    if args.replot and args.plot is None:
        raise ConfigError("--plot is not given: --replot needs a file for the picture")
    if args.time_limit is not None and args.time_limit <= 0:
        raise ConfigError(f"--time-limit is {args.time_limit}: allowed is a number > 0")
    if not args.startup_seconds > 0:
        raise ConfigError(f"--startup-seconds is {args.startup_seconds}: allowed is a number > 0")


def _old_rows(args: argparse.Namespace) -> "list[BenchRow]":
    from flashmemory_vllm.benchmark.rows import load_rows

    path: Path = args.table or args.replot
    if not path.exists():
        raise ConfigError(f"{path} does not exist: allowed is a file of rows")
    return load_rows(path)


def _measure(args: argparse.Namespace) -> "list[BenchRow]":
    from flashmemory_vllm.benchmark.cells import make_cells
    from flashmemory_vllm.benchmark.process import EngineProcess
    from flashmemory_vllm.benchmark.run import BenchRun

    engines = read_engines(args.engines or DEFAULT_ENGINES)
    scenarios = [load_scenario(path, args.settings) for path in args.scenarios]
    check_names([scenario.name for scenario in scenarios])
    provenance = Provenance.collect_elsewhere(["flashmemory", *sys.argv[1:]], args.commit)
    model = model_arguments(args.model, args.shape, args.layers)
    cells = choose_cells([cell for scenario in scenarios for cell in make_cells(scenario, engines, model)], args.only)
    bench = BenchRun(
        shape_label(args.shape, args.layers) if args.shape else Path(model["model"]).name,
        args.out,
        provenance,
        args.resume,
        args.time_limit,
        lambda job: EngineProcess(job, args.log, args.startup_seconds),
    )
    return bench.run(cells)


def read_engines(text: str) -> tuple[EngineName, ...]:
    """Engines of the option `--engines`.

    Raises:
        ConfigError: one is unknown.
    """
    known: dict[str, EngineName] = {name: name for name in get_args(EngineName)}
    return tuple(known[name] for name in chosen_names("--engines", text, known))


def choose_cells(cells: "Sequence[Cell]", only: str | None) -> "list[Cell]":
    """Cells of the measurements that the option `--only` names; all if it is None.

    Raises:
        ConfigError: the scenarios have no measurement of a name.
    """
    if only is None:
        return list(cells)
    wanted = chosen_names("--only", only, [f"{cell.scenario}/{cell.measurement}" for cell in cells])
    return [cell for cell in cells if f"{cell.scenario}/{cell.measurement}" in wanted]
