"""`flashmemory bench`: stock vLLM and our backend on the same loads, one row for each."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from flashmemory_vllm.benchmark.scenario import EngineName, Scenario, load_scenario
from flashmemory_vllm.cli.shapes import SHAPES, shape_fields, shape_label
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.files import write_json
from flashmemory_vllm.reference import reference_model_path

if TYPE_CHECKING:
    from flashmemory_vllm.benchmark.cells import Cell
    from flashmemory_vllm.benchmark.rows import BenchRow


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `bench` command."""
    parser = subparsers.add_parser("bench", help="time stock vLLM and this backend on the same loads")
    parser.add_argument("scenarios", nargs="*", type=Path, metavar="SCENARIO", help="YAML files, see configs/bench")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="folder or Hugging Face id. Default: the shipped model")
    model.add_argument("--shape", choices=tuple(SHAPES), help="a model of these sizes with random weights")
    parser.add_argument("--layers", type=int, metavar="N", help="the first N layers of --shape. Default: all")
    parser.add_argument(
        "--engines", default="stock,flashmemory", help="comma-separated, also offload and ideal. Default: %(default)s"
    )
    parser.add_argument("--only", metavar="NAMES", help="comma-separated SCENARIO/MEASUREMENT. Default: all there are")
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

    engines = read_engines(args.engines)
    scenarios = [load_scenario(path, args.settings) for path in args.scenarios]
    _check_names(scenarios)
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
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"--engines has {', '.join(map(repr, unknown))}: allowed is {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names))


def choose_cells(cells: "Sequence[Cell]", only: str | None) -> "list[Cell]":
    """Cells of the measurements that the option `--only` names; all if it is None.

    Raises:
        ConfigError: the scenarios have no measurement of a name.
    """
    if only is None:
        return list(cells)
    wanted = [name.strip() for name in only.split(",")]
    known = dict.fromkeys(f"{cell.scenario}/{cell.measurement}" for cell in cells)
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigError(f"--only has {', '.join(map(repr, unknown))}: allowed is {', '.join(known)}")
    return [cell for cell in cells if f"{cell.scenario}/{cell.measurement}" in wanted]


def model_arguments(model: str | None, shape: str | None, num_layers: int | None = None) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that say what to serve.

    A shape's configuration lies in the user's cache, always in the same folder: vLLM's compilation cache goes by it.

    Args:
        model: folder or id, or None.
        shape: name of a shape, or None. Without either it is the shipped model.
        num_layers: the first so many layers of the shape. Default: all.

    Raises:
        ConfigError: the shape has not so many, or there is none.
    """
    if shape is None:
        if num_layers is not None:
            raise ConfigError(f"--layers is {num_layers} without --shape: allowed is unset")
        return {"model": model or str(reference_model_path())}
    fields = shape_fields(shape, num_layers)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = shape if num_layers is None else f"{shape}-{num_layers}"
    folder = cache / "flashmemory" / "shapes" / name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", fields)
    return {"model": str(folder), "load_format": "dummy"}


def _check_names(scenarios: Sequence[Scenario]) -> None:
    names = [scenario.name for scenario in scenarios]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"scenarios named {', '.join(twice)} twice: allowed are different names")
