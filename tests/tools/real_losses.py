"""What sparse decode costs a real language model: `flashmemory eval --suites loss` for every cell of a plan.

    python -m tests.tools.real_losses PLAN --model FOLDER --texts FILE --out FOLDER --rows FILE [--only NAMES]

A plan (`configs/loss/`) names options for each cell. Cells of one context share the dense server's losses, which come
with the first of them in the plan: it is measured if it has not been, whatever `--only` names. A cell that has been
measured is not measured again, and a row takes the place of an older one of the same cell.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from flashmemory_vllm.cli.plan import model_sizes, read_model_fields
from flashmemory_vllm.config import SECTION, FlashMemoryConfig
from flashmemory_vllm.evaluation.eval_rows import load_evaluation
from flashmemory_vllm.evaluation.loss import loss_lines
from flashmemory_vllm.files import write_json
from flashmemory_vllm.indexer.checkpoint import read_spec
from flashmemory_vllm.own_options import OwnOptions
from flashmemory_vllm.runtime.beside import index_bytes_per_block
from flashmemory_vllm.runtime.shape import AttentionShape

_SERVER_ARGUMENTS = ("serve-args", "dense-args", "sparse-args")


@dataclass(frozen=True, slots=True)
class Cell:
    """A configuration that a user would run, and the text that it is measured on.

    Attributes:
        model: its name in the row.
        name: of the cell in its plan.
        context: tokens of a prompt.
        documents: prompts.
        options: our section.
        is_default: whether the selection is the one without options of its own.
    """

    model: str
    name: str
    context: int
    documents: int
    options: Mapping[str, Any]
    is_default: bool


@dataclass(frozen=True, slots=True)
class LossRow:
    """One cell.

    Attributes:
        model: see `Cell`, as are cell and context.
        selector: how blocks are chosen.
        tau: decode steps between two selections of a request.
        ratio: resident blocks over all blocks, as asked for.
        gap: nats a token above the dense server on the same text.
        se: standard error of `gap` over documents.
        documents: how many.
        steps: forced tokens of each.
        dense: loss of the dense server, nats a token.
        blocks_per_token: blocks that came from the host, a token.
        device_share: bytes of resident blocks and of all blocks' index keys over the bytes of all blocks.
        block_size: tokens in a block.
        options: our section.
        default: see `Cell`.
        command: of `flashmemory eval`.
        commit: see `Provenance`, as are gpu and versions.
        gpu: name of the device.
        versions: version by distribution.
    """

    model: str
    cell: str
    selector: str
    tau: int
    ratio: float
    context: int
    gap: float
    se: float | None
    documents: int
    steps: int
    dense: float
    blocks_per_token: float | None
    device_share: float | None
    block_size: int
    options: Mapping[str, Any]
    default: bool
    command: str
    commit: str
    gpu: str
    versions: Mapping[str, str]


def read_cells(plan: Mapping[str, Any]) -> list[Cell]:
    """The cells of a plan, in its order."""
    cells = []
    for name, own in plan["cells"].items():
        options = {**plan["options"], **own}
        context = options.pop("context", plan["context"])
        is_default = not {"selector", "indexer", *OwnOptions._fields} & set(own)
        cells.append(Cell(plan["model"], name, context, plan["documents"], options, is_default))
    return cells


def row_of(cell: Cell, folder: Path, shape: AttentionShape, tau: int) -> LossRow:
    """What was measured of a cell.

    Args:
        cell: which.
        folder: of its evaluation.
        shape: the model's attention layers.
        tau: decode steps between two selections.
    """
    evaluation = load_evaluation(folder)
    assert evaluation is not None, folder
    (line,) = loss_lines(evaluation)
    (row,) = evaluation.of("loss", "sparse")
    config = FlashMemoryConfig.from_additional_config({SECTION: cell.options})
    index_share = index_bytes_per_block(config, shape) / shape.block_bytes
    return LossRow(
        model=cell.model,
        cell=cell.name,
        selector=config.selector,
        tau=tau,
        ratio=config.resident_ratio,
        context=cell.context,
        gap=round(line.gap, 4),
        se=None if line.stderr is None else round(line.stderr, 4),
        documents=line.documents,
        steps=line.steps,
        dense=round(line.dense, 4),
        blocks_per_token=line.fetched_blocks,
        device_share=None if line.resident_share is None else round(line.resident_share + index_share, 4),
        block_size=shape.block_size,
        options=cell.options,
        default=cell.is_default,
        command=row.command,
        commit=row.commit,
        gpu=row.gpu,
        versions=row.versions,
    )


def merged(old: Iterable[Mapping[str, Any]], new: Iterable[LossRow]) -> list[dict[str, Any]]:
    """Rows of a file with those that were measured now, which replace older ones of the same cell."""
    rows = {(row["model"], row["cell"], row["gpu"]): dict(row) for row in old}
    rows |= {(row.model, row.cell, row.gpu): asdict(row) for row in new}
    return list(rows.values())


@dataclass(frozen=True, slots=True)
class Sweep:
    """A plan with the machine's own files.

    Attributes:
        plan: what the file says.
        model: folder of the model.
        texts: file of texts.
        out: for a folder of each cell.
        commit: commit to name in the rows; None to ask git.
    """

    plan: Mapping[str, Any]
    model: Path
    texts: Path
    out: Path
    commit: str | None

    def measure(self, cell: Cell, dense_from: Path | None) -> None:
        """Run `flashmemory eval`, unless that was done.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        section = json.dumps({SECTION: dict(cell.options)})
        words: dict[str, object] = {
            "model": self.model,
            "suites": "loss",
            "texts": self.texts,
            "lengths": cell.context,
            "documents": cell.documents,
            "concurrency": self.plan["concurrency"],
            "out": self.out / cell.name,
            "additional-config": section,
            "dense-from": dense_from,
            "commit": self.commit,
        }
        words |= {name: self.plan.get(name) for name in _SERVER_ARGUMENTS}
        if dense_from is not None:
            words.pop("dense-args", None)
        given = [word for name, value in words.items() if value is not None for word in (f"--{name}", str(value))]
        subprocess.run([sys.executable, "-m", "flashmemory_vllm.cli.app", "eval", *given], check=True)

    def run(self, cells: Sequence[Cell], jobs: int) -> None:
        """Measure cells, the first one of a context in the plan with the dense server, the others beside each other."""
        for context in dict.fromkeys(cell.context for cell in cells):
            first = next(cell for cell in read_cells(self.plan) if cell.context == context)
            others = [cell for cell in cells if cell.context == context and cell.name != first.name]
            self.measure(first, None)
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(lambda cell, base=self.out / first.name: self.measure(cell, base), others))


def main(words: Sequence[str]) -> int:
    """Measure what the words ask for and write its rows."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.real_losses", description=__doc__)
    parser.add_argument("plan", type=Path)
    for name in ("model", "texts", "out", "rows"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--only", help="comma-separated names of cells. Default: all")
    parser.add_argument("--jobs", type=int, default=1, help="sparse servers at once. Default: %(default)s")
    parser.add_argument("--block-size", type=int, default=16, help="as in the plan's serve-args. Default: %(default)s")
    parser.add_argument("--commit", help="commit to name in the rows, where git is not there to ask")
    args = parser.parse_args(words)
    plan = yaml.safe_load(args.plan.read_text(encoding="utf-8"))
    only = args.only and args.only.split(",")
    cells = [cell for cell in read_cells(plan) if not only or cell.name in only]
    Sweep(plan, args.model, args.texts, args.out, args.commit).run(cells, args.jobs)
    shape = model_sizes(read_model_fields(str(args.model)), "auto").shape(args.block_size)
    rows = [row_of(cell, args.out / cell.name, shape, _tau(cell)) for cell in cells]
    old = json.loads(args.rows.read_text(encoding="utf-8")) if args.rows.exists() else []
    write_json(args.rows, merged(old, rows))
    return 0


def _tau(cell: Cell) -> int:
    config = FlashMemoryConfig.from_additional_config({SECTION: cell.options})
    return config.tau(None if config.indexer is None else read_spec(Path(config.indexer)).tau)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
