"""What a decode step costs the host in our own code, by part: rows that all decode, whose sets change all the time.

    python -m tests.tools.host_cost [--rows 64] [--tokens 6144] [--tau 4] [--changes 0.43] [--steps 300] [--out FILE]

The real runtime runs step after step on the CPU, without a model. What a device would do is not counted: scoring,
`choose_sets`, `apply_step` and copies of pages stand here as plain functions whose own time is taken off. Worths are
drawn anew at such a rate that about `--changes` blocks come into each row's set in a step. Other torch calls are those
that enqueue work on a device; they cost a GPU machine some microseconds each as well, so they count.

Prints microseconds of CPU time a step, 10th percentile, median and 95th percentile, one part a line, parts of parts
indented. With --out they are appended to a file of rows; `NUMBA_DISABLE_JIT=1` measures what is done without numba.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from flashmemory_kernels.choose_sets import choose_sets
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.remember_shares import Channel

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.files import write_json
from flashmemory_vllm.indexer.base import IndexGeometry, Selector
from flashmemory_vllm.indexer.places import DueRows, MemoryKind, PlaceState
from flashmemory_vllm.kinds.base import PageKind
from flashmemory_vllm.kinds.pages import InterleavedPages
from flashmemory_vllm.observability.counters import CounterWriter, worker_name
from flashmemory_vllm.residency.asking import Asking
from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.budget import cdiv
from flashmemory_vllm.residency.decode_rows import DecodeRows
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.residency.quick.compiled import IS_COMPILED
from flashmemory_vllm.residency.registry import RequestRegistry
from flashmemory_vllm.residency.types import NewRequest, RunningRequest, StepInput
from flashmemory_vllm.runtime import assembly, choice, tables
from flashmemory_vllm.runtime.capacity import budget_policy
from flashmemory_vllm.runtime.changes import TableChanges
from flashmemory_vllm.runtime.choices import ChoiceQueue
from flashmemory_vllm.runtime.history import SelectionHistory
from flashmemory_vllm.runtime.report import Reporter
from flashmemory_vllm.runtime.runtime import ResidencyRuntime
from flashmemory_vllm.runtime.shape import AttentionShape
from flashmemory_vllm.runtime.tables import StepTables
from flashmemory_vllm.transfer.engine import CpuTransferEngine

BLOCK, LAYERS, HEADS, HEAD_DIM = 16, 1, 1, 2
CHUNK = 512
WARM_STEPS = 40
# Part, indent, class and method
PARTS: tuple[tuple[str, int, type, str], ...] = (
    ("begin", 0, ResidencyRuntime, "_begin"),
    ("lists taken", 1, ChoiceQueue, "take"),
    ("plan", 1, StepPlanner, "plan"),
    ("requests", 2, RequestRegistry, "schedule"),
    ("decode rows", 2, DecodeRows, "settle"),
    ("apply", 3, DecodeRows, "_apply"),
    ("slots", 2, Books, "settle"),
    ("asked", 2, Asking, "asked"),
    ("history", 1, SelectionHistory, "note"),
    ("batch", 0, ResidencyRuntime, "set_batch"),
    ("tables", 1, StepTables, "write"),
    ("packed", 2, TableChanges, "pack"),
    ("end", 0, ResidencyRuntime, "_end"),
    ("choose", 1, ChoiceQueue, "choose"),
    ("report", 1, Reporter, "publish"),
)


class Clock:
    """Tells how long calls take, but for what stands in for a device."""

    def __init__(self) -> None:
        self._left_out = 0.0
        self.step: dict[str, float] = dict.fromkeys((part for part, *_ in PARTS), 0.0)

    def now(self) -> float:
        """Microseconds, which stand still inside of what is left out."""
        return (time.thread_time() - self._left_out) * 1e6

    def counted(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, whose time counts for a part of the step."""

        def timed(*args: Any, **words: Any) -> Any:
            began = self.now()
            try:
                return call(*args, **words)
            finally:
                self.step[part] += self.now() - began

        return timed

    def left_out(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, whose time counts for nothing."""

        def untimed(*args: Any, **words: Any) -> Any:
            began = time.thread_time()
            try:
                return call(*args, **words)
            finally:
                self._left_out += time.thread_time() - began

        return untimed


class DrawnSelector(Selector):
    """Remembers what is drawn, and at each selection draws some of it anew."""

    name = "drawn"
    is_finite = True
    needs_queries = False
    needs_keys = False

    def __init__(self, geometry: IndexGeometry, changed: float) -> None:
        super().__init__(geometry)
        self._changed, self._generator = changed, torch.Generator().manual_seed(0)

    @property
    def memory_kind(self) -> MemoryKind:
        """One channel that fades, as that of a selector that scores by shares of attention."""
        return MemoryKind((Channel(0.9),), num_queries=0)

    def remember(self, due: DueRows, state: PlaceState) -> None:
        """Draw, for all rows at once."""
        places = due.places
        known = state.memory[0][:, places]
        drawn = torch.rand(known.shape, generator=self._generator)
        is_new = due.on_device[:, Due.NUM_KNOWN] == 0
        is_drawn = (torch.rand(known.shape, generator=self._generator) < self._changed) | is_new[None, :, None]
        state.memory[0][:, places] = torch.where(is_drawn, drawn, known)


class HostSteps:
    """A runtime, and requests that it decodes.

    Args:
        rows: how many.
        tokens: of each when it begins to decode; the others begin one token later each, up to a block.
        tau: tokens between two selections of a request.
        changes: blocks that come into the set of a row in a step.
        num_steps: that are to come.
        folder: for counters.
    """

    def __init__(self, rows: int, tokens: int, tau: int, changes: float, num_steps: int, folder: Path) -> None:
        longest = tokens + BLOCK + num_steps + 2
        width = cdiv(longest, BLOCK) + 1
        # Every block that is drawn better comes, and by itself
        config = FlashMemoryConfig(
            selector="exact", tau_steps=tau, min_sparse_tokens=0, successor_share=0.0, hysteresis=0.0
        )
        budget = budget_policy(config, block_size=BLOCK, max_num_batched_tokens=CHUNK, max_model_len=longest)
        num_slots = rows * (budget.most_held(longest) + 2) + 2 * cdiv(CHUNK, BLOCK)
        # Of the candidates that are drawn anew some share comes into the set
        forced = budget.sink_blocks(tokens) + budget.recent_blocks(tokens)
        candidates, want = cdiv(tokens, BLOCK) - forced, budget.decode_budget(tokens) - forced
        drawn = min(1.0, changes / (want * (1 - want / candidates)))
        shape = AttentionShape(
            tuple(map(str, range(LAYERS))), HEADS, HEADS, HEAD_DIM, 1.0, BLOCK, torch.float32, torch.device("cpu")
        )
        page = (HEADS, BLOCK, 2 * HEAD_DIM)

        def make(_: str, geometry: IndexGeometry, **__: object) -> Selector:
            return DrawnSelector(geometry, 1 - (1 - drawn) ** tau)

        with mock.patch.object(assembly, "create_selector", make):
            self.runtime = assembly.build_runtime(
                shape=shape,
                caches=[torch.zeros(num_slots, *page) for _ in range(LAYERS)],
                kind=PageKind(InterleavedPages(HEADS, BLOCK, HEAD_DIM), 1.0, lambda *_, **__: None),  # type: ignore[arg-type]
                config=config,
                budget=budget,
                sizes=assembly.RuntimeSizes(rows * width + 1, 2, rows, rows + CHUNK),
                counters=CounterWriter.create(folder / "engine", worker_name(0)),
            )
        self._step, self._width = 0, width
        self._computed: dict[str, int] = {}
        for row in range(rows):
            self._prefill(f"chatcmpl-{row:032d}", tokens + row % BLOCK)

    @property
    def num_come(self) -> int:
        """Blocks that lists have brought into sets."""
        return self.runtime._parts.planner.counters.prefetched_blocks

    def decode(self) -> None:
        """One step of all rows."""
        tokens = dict.fromkeys(self._computed, 1)
        running = [RunningRequest(name, self._begun(name, 1), done) for name, done in self._computed.items()]
        self._run(StepInput(self._step + 1, (), (), (), tuple(running), tokens))

    def _prefill(self, name: str, num_tokens: int) -> None:
        """A prompt in chunks, while all others wait."""
        self._computed[name] = 0
        for start in range(0, num_tokens, CHUNK):
            count = min(CHUNK, num_tokens - start)
            ids = self._begun(name, count)
            new = (NewRequest(name, ids, 0, num_tokens),) if start == 0 else ()
            running = () if new else (RunningRequest(name, ids, start),)
            self._run(StepInput(self._step + 1, (), (), new, running, {name: count}))

    def _begun(self, name: str, count: int) -> tuple[int, ...]:
        """Logical blocks that so many more tokens need."""
        done, first = self._computed[name], 1 + int(name.rpartition("-")[2]) * self._width
        return tuple(range(first + cdiv(done, BLOCK), first + cdiv(done + count, BLOCK)))

    def _run(self, step_input: StepInput) -> None:
        self._step += 1
        names = list(step_input.num_scheduled_tokens)
        done = [self._computed[name] + step_input.num_scheduled_tokens[name] for name in names]
        lengths = torch.tensor(done, dtype=torch.int32)
        mapping = torch.zeros(sum(step_input.num_scheduled_tokens.values()), dtype=torch.int64)
        with self.runtime.step(step_input):
            self.runtime.set_batch(names, lengths, mapping)
        self._computed |= dict(zip(names, done, strict=True))


def measure(rows: int, tokens: int, tau: int, changes: float, num_steps: int) -> tuple[list[dict[str, float]], float]:
    """Microseconds of each part of each step, and how many blocks came into the set of a row in a step."""
    clock, measured = Clock(), list[dict[str, float]]()
    with ExitStack() as replaced:
        folder = replaced.enter_context(tempfile.TemporaryDirectory())
        stand_ins: tuple[tuple[object, str, Callable[..., Any]], ...] = (
            (CpuTransferEngine, "_recall", lambda *_: None),
            (CpuTransferEngine, "_write_back", lambda *_: None),
            (tables, "apply_step", lambda *_: None),
            (DrawnSelector, "remember", clock.left_out(DrawnSelector.remember)),
            (choice, "choose_sets", clock.left_out(choose_sets)),
        )
        for where, name, call in stand_ins:
            replaced.enter_context(mock.patch.object(where, name, call))
        steps = HostSteps(rows, tokens, tau, changes, num_steps + WARM_STEPS, Path(folder))
        for part, _, owner, name in PARTS:
            replaced.enter_context(mock.patch.object(owner, name, clock.counted(part, getattr(owner, name))))
        for _ in range(WARM_STEPS):
            steps.decode()
        before = steps.num_come
        for _ in range(num_steps):
            clock.step = dict.fromkeys((part for part, *_ in PARTS), 0.0)
            steps.decode()
            measured.append(clock.step)
        return measured, (steps.num_come - before) / num_steps / rows


def main(words: Sequence[str]) -> int:
    """Measure what the words ask for."""
    parser = argparse.ArgumentParser(description="what a decode step costs the host in our own code")
    parser.add_argument("--rows", type=int, default=64, help="requests. Default: %(default)s")
    parser.add_argument("--tokens", type=int, default=6144, help="tokens of each. Default: %(default)s")
    parser.add_argument("--tau", type=int, default=4, help="tokens between two selections. Default: %(default)s")
    parser.add_argument("--changes", type=float, default=0.43, help="blocks that come, a row and step. Default: 0.43")
    parser.add_argument("--steps", type=int, default=300, help="steps that are measured. Default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file that rows are appended to")
    parser.add_argument("--commit", default="unknown", help="commit to name in the rows. Default: %(default)s")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    with torch.inference_mode():
        measured, came = measure(args.rows, args.tokens, args.tau, args.changes, args.steps)
    selection = ("lists taken", "decode rows", "slots", "asked", "choose")
    parts = {2 * indent * " " + part: [step[part] for step in measured] for part, indent, _, _ in PARTS}
    parts["all selections"] = [sum(step[part] for part in selection) for step in measured]
    parts["all"] = [sum(step[part] for part, indent, _, _ in PARTS if not indent) for step in measured]
    write = sys.stdout.write
    write(f"{args.rows} rows of {args.tokens} tokens, tau {args.tau}: {came:.2f} blocks come, a row and step\n")
    write(f"{'us a step':24}{'p10':>9}{'median':>9}{'p95':>9}\n")
    rows = [_row(args, name.strip(), values, round(came, 3)) for name, values in parts.items()]
    for name, row in zip(parts, rows, strict=True):
        write(f"{name:24}{row['p10']:9.0f}{row['value']:9.0f}{row['p95']:9.0f}\n")
    if args.out is not None:
        earlier = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else []
        write_json(args.out, [*earlier, *rows])
    return 0


def _row(args: argparse.Namespace, part: str, values: list[float], came: float) -> dict[str, Any]:
    ordered = sorted(values)
    low, high = (round(ordered[int(share * len(ordered))], 1) for share in (0.1, 0.95))
    without = "NUMBA_DISABLE_JIT=1 " if os.environ.get("NUMBA_DISABLE_JIT") == "1" else ""
    asked = f"--rows {args.rows} --tokens {args.tokens} --tau {args.tau} --changes {args.changes} --steps {args.steps}"
    return {
        "scenario": "host-step",
        "measurement": f"{args.rows} x {args.tokens}, tau {args.tau}",
        "part": part,
        "value": round(statistics.median(values), 1),
        "unit": "us of CPU time a step",
        "p10": low,
        "p95": high,
        "blocks_per_row": came,
        "is_compiled": IS_COMPILED,
        "gpu": None,
        "versions": {name: version(name) for name in ("torch", "numpy", "numba")},
        "commit": args.commit,
        "command": f"{without}python -m tests.tools.host_cost {asked} --out host-step.json --commit {args.commit}",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
