"""Measures both ways to copy pages, `python -m flashmemory_vllm.transfer.benchmark --out rows.json`.

A copy kernel takes multiprocessors from the model, the copy engines take time for each page. So each way is
timed alone, and beside work that is bound by memory (matrix times vector) or by arithmetic (matrix times
matrix). The result is behind `cuda_engine.MIN_DMA_PAGE_BYTES` and `copy_pages`' number of programs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

import numpy as np
import torch

from flashmemory_vllm.errors import UnsupportedError
from flashmemory_vllm.files import write_json
from flashmemory_vllm.transfer.batched_copy import batched_copy, has_batched_copy
from flashmemory_vllm.transfer.engine import Ids

PAGE_BYTES = (64 << 10, 256 << 10, 2 << 20)
NUM_PAGES = (8, 32, 128, 512)
NUM_PROGRAMS = (8, 16, 32)
# From this many pages on a copy is long enough to be measured beside other work.
MIN_PAGES_BESIDE = 128
COPIED_BYTES = 256 << 20
MATRIX_DIM = 4096
# Together they are larger than the L2 cache.
NUM_MATRICES = 8
NUM_PRODUCTS = {"memory": 800, "compute": 40}
# About 30 ms: both streams are filled before either starts.
GATE_CYCLES = 50_000_000

Copy = Callable[[torch.cuda.Stream], None]


@dataclass(frozen=True, slots=True)
class CopyRow:
    """One measurement.

    Attributes:
        device: name of the GPU.
        direction: h2d or d2h.
        page_kib: KiB of a page.
        pages: pages of one copy.
        method: dma, or kernel and its number of programs.
        gb_per_s: 1e9 bytes a second, alone.
        memory_slowdown: percent that memory-bound work takes longer beside it. None if not measured.
        compute_slowdown: the same of compute-bound work.
    """

    device: str
    direction: str
    page_kib: int
    pages: int
    method: str
    gb_per_s: float
    memory_slowdown: float | None
    compute_slowdown: float | None


class Work:
    """Matrix products on the compute stream.

    Args:
        kind: memory or compute.
    """

    def __init__(self, kind: str) -> None:
        shape = (NUM_MATRICES, MATRIX_DIM, MATRIX_DIM)
        self._left = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        columns = 1 if kind == "memory" else MATRIX_DIM
        self._right = torch.randn(MATRIX_DIM, columns, dtype=torch.bfloat16, device="cuda")
        self._out = torch.empty(MATRIX_DIM, columns, dtype=torch.bfloat16, device="cuda")
        self._num_products = NUM_PRODUCTS[kind]
        self.milliseconds(None, 0)  # warms up
        self.alone_ms = self.milliseconds(None, 0)

    def slowdown(self, copy: Copy, copy_ms: float) -> float:
        """Percent longer than alone while copies run all the time."""
        num_copies = 1 + int(2 * self.alone_ms / copy_ms)
        return 100 * (self.milliseconds(copy, num_copies) / self.alone_ms - 1)

    def milliseconds(self, copy: Copy | None, num_copies: int) -> float:
        """Time of all products, with copies on a stream of their own that start with them."""
        compute, beside = torch.cuda.current_stream(), torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
        torch.cuda._sleep(GATE_CYCLES)  # type: ignore[no-untyped-call]
        beside.wait_stream(compute)
        with torch.cuda.stream(beside):
            for _ in range(num_copies):
                assert copy is not None
                copy(beside)
        start, end = _timer(), _timer()
        start.record()
        for index in range(self._num_products):
            torch.mm(self._left[index % NUM_MATRICES], self._right, out=self._out)
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))


def measure() -> Iterator[CopyRow]:
    """Measure every combination, in about half a minute.

    Raises:
        UnsupportedError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError("the transfer benchmark needs a CUDA device; this machine has none")
    num_words = max(PAGE_BYTES) * max(NUM_PAGES) // 4
    host = torch.zeros(num_words, dtype=torch.int32, pin_memory=True)
    device = torch.zeros(num_words, dtype=torch.int32, device="cuda")
    works = {kind: Work(kind) for kind in NUM_PRODUCTS}
    generator = np.random.default_rng(0)
    for direction, page_bytes, num_pages in product(("h2d", "d2h"), PAGE_BYTES, NUM_PAGES):
        places = (host, device) if direction == "h2d" else (device, host)
        source, target = (place.view(-1, page_bytes // 4) for place in places)
        ids = [generator.permutation(len(source))[:num_pages] for _ in places]
        for method, copy in _methods(source, ids[0], target, ids[1]).items():
            copy_ms = _milliseconds(copy, max(2, min(20, COPIED_BYTES // (num_pages * page_bytes))))
            beside = works if num_pages >= MIN_PAGES_BESIDE else {}
            slowdowns = {kind: work.slowdown(copy, copy_ms) for kind, work in beside.items()}
            yield CopyRow(
                device=torch.cuda.get_device_name(),
                direction=direction,
                page_kib=page_bytes >> 10,
                pages=num_pages,
                method=method,
                gb_per_s=num_pages * page_bytes / copy_ms / 1e6,
                memory_slowdown=slowdowns.get("memory"),
                compute_slowdown=slowdowns.get("compute"),
            )


def _methods(source: torch.Tensor, source_ids: Ids, target: torch.Tensor, target_ids: Ids) -> dict[str, Copy]:
    from flashmemory_kernels.copy_pages.kernel import copy_pages_triton

    on_device = torch.from_numpy(np.stack((source_ids, target_ids))).cuda()

    def by_kernel(num_programs: int) -> Copy:
        return lambda _: copy_pages_triton(source, on_device[0], target, on_device[1], num_programs)

    methods = {f"kernel {num_programs}": by_kernel(num_programs) for num_programs in NUM_PROGRAMS}
    if has_batched_copy():
        methods["dma"] = lambda stream: batched_copy(source, source_ids, target, target_ids, stream)
    return methods


def _milliseconds(copy: Copy, repeats: int) -> float:
    """Time of one copy on an idle device."""
    stream, start, end = torch.cuda.Stream(), _timer(), _timer()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        copy(stream)  # warms up
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            copy(stream)
        end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / repeats


def _timer() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def table_line(values: Sequence[object]) -> str:
    """One line of the table, numbers to one decimal and right-aligned."""
    texts = ["-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value) for value in values]
    return "".join(f"{text:>18}" for text in texts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m flashmemory_vllm.transfer.benchmark", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written anew")
    out: Path = parser.parse_args(argv).out
    columns = [field.name for field in fields(CopyRow)][1:]
    sys.stdout.write(table_line(columns))
    rows: list[CopyRow] = []
    for row in measure():
        rows.append(row)
        sys.stdout.write(table_line([getattr(row, column) for column in columns]))
        sys.stdout.flush()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, [asdict(row) for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
