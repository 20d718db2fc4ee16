"""Times the memories of an 8B model's requests, `python -m flashmemory_vllm.indexer.benchmark --out rows.json`.

One call of `Selector.remember`, as serving makes it for all rows that are due in a step: from captured queries to what
each of their blocks is remembered for. It is timed alone on the device with a cold L2 cache. Reading the index is most
of its work, so the bytes are shown beside the bandwidth that a plain copy reaches in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from flashmemory_kernels.benchmark import Measure, measure_ceilings, measure_cuda, row_facts

from flashmemory_vllm.errors import ConfigError, UnsupportedError
from flashmemory_vllm.files import write_json
from flashmemory_vllm.indexer.base import IndexGeometry, Selector
from flashmemory_vllm.indexer.checkpoint import save_indexer
from flashmemory_vllm.indexer.due import DueRequest, due_rows
from flashmemory_vllm.indexer.factory import create_selector
from flashmemory_vllm.indexer.neural import NeuralSelector
from flashmemory_vllm.indexer.neural_model import IndexerSpec, NeuralIndexer
from flashmemory_vllm.indexer.places import PlaceState

MODULE = "flashmemory_vllm.indexer.benchmark"
# Rows that are due in a step, and tokens of each: a quarter of 64 and of 8, as with a selection every four steps
BATCHES = ((16, 6_144), (2, 32_768), (1, 131_072), (1, 500_000))
BLOCK_SIZE = 16
NUM_LAYERS = 32
ANCHOR_LAYERS = (8, 16, 24)
# Keys and values of all layers, 8 heads of 128 in bf16
KV_BYTES_PER_TOKEN = NUM_LAYERS * 2 * 8 * 128 * torch.bfloat16.itemsize
RESIDENT_RATIO = 0.135
CHUNK_SIZE = 4
# First selections, and the tokens of a question that they are made with
FIRST = "neural-first"
QUERY_WINDOW = 16
TAU = 4
FORECAST = "neural-forecast"
# As `flashmemory train` makes an indexer of an 8B model
RANK, MEMORY_DECAYS = 512, (0.0, 0.7, 0.9, 0.98, 0.99, 1.0)
NEURAL = ("neural", FIRST, FORECAST)
# What is remembered of all tokens, with the queries of each; the last one is what is served by default
_SERVED = {"memory_decay": 0.9, "question_share": 0.3, "index_dtype": "fp8"}
MEMORY: dict[str, dict[str, Any]] = {"exact-memory": {"memory_decay": 0.9}, "exact-fp8": _SERVED}
SELECTORS = ("mean", "bounds", "exact", *MEMORY, "h2o", *NEURAL)
_SHAPE = ("num_query_heads", "num_kv_heads", "head_dim", "block_size", "anchor_layers")
# Blocks whose index keys are made at once, and calls that the host's time is the median of.
ADDED_BLOCKS = 1024
HOST_RUNS = 50


@dataclass(frozen=True, slots=True)
class SelectionRow:
    """One measurement.

    Attributes:
        scenario: always "selection".
        measurement: selector, rows and tokens of each.
        value: median time on the device.
        unit: of `value`, "us".
        host_us: median time in which the host enqueues it.
        device_bytes: bytes that it has to read: the index keys of all blocks, and a neural indexer's weights.
        gb_per_s: 1e9 of these bytes a second.
        ceiling_gb_per_s: what a plain copy inside the device reads and writes together.
        share: of the ceiling.
        index_bytes_per_token: device bytes of index keys.
        kv_bytes_per_token: bytes of keys and values in all layers of the model, for comparison.
        gpu: name of the device.
        versions: version by distribution.
        commit: commit of the checkout.
        command: the command line.
    """

    scenario: str
    measurement: str
    value: float
    unit: str
    host_us: float
    device_bytes: int
    gb_per_s: float
    ceiling_gb_per_s: float
    share: float
    index_bytes_per_token: float
    kv_bytes_per_token: int
    gpu: str
    versions: Mapping[str, str]
    commit: str
    command: str


def make_geometry(num_tokens: int, device: torch.device) -> IndexGeometry:
    """Sizes of an 8B model with grouped queries and room for so many tokens, whole blocks of them."""
    return IndexGeometry(
        num_logical_blocks=num_tokens // BLOCK_SIZE + 1,
        block_size=BLOCK_SIZE,
        num_query_heads=32,
        num_kv_heads=8,
        head_dim=128,
        softmax_scale=128**-0.5,
        anchor_layers=ANCHOR_LAYERS,
        layer_groups=(0,) * len(ANCHOR_LAYERS),
        num_groups=1,
        dtype=torch.bfloat16,
        device=device,
    )


def make_selector(name: str, geometry: IndexGeometry) -> Selector:
    """A selector of `SELECTORS` with an empty index; a neural one has drawn weights."""
    if name not in NEURAL:
        return create_selector(name.partition("-")[0], geometry, **MEMORY.get(name, {}))
    decays = MEMORY_DECAYS if name == FORECAST else ()
    model = NeuralIndexer(replace(_indexer_spec(geometry), memory_decays=decays))
    model.init_weights(torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "indexer.safetensors"
        save_indexer(model, path)
        return create_selector("neural", geometry, indexer=str(path), index_dtype="fp8")


def _indexer_spec(geometry: IndexGeometry) -> IndexerSpec:
    return IndexerSpec(
        model="8B",
        num_layers=NUM_LAYERS,
        **{name: getattr(geometry, name) for name in _SHAPE},
        chunk_size=CHUNK_SIZE,
        reach=2,
        query_window=QUERY_WINDOW,
        opening_steps=0,
        rank=RANK,
        num_heads=geometry.num_query_heads,
        dim=128,
        aggregate="max",
        threshold=0.5,
        tau=64,
        delay=1,
        data="drawn weights",
    )


def make_call(selector: Selector, num_rows: int, *, first: bool = False) -> Callable[[], torch.Tensor]:
    """Selections of requests that fill the index: their later ones, with a query or as many as were since the last one.

    Args:
        selector: with an empty index.
        num_rows: requests that share it evenly.
        first: their first ones instead, with all tokens of a question.

    Returns:
        What brings their memories `[C, G, n, W]` up to date, and gives them back.
    """
    geometry, kind = selector.geometry, selector.memory_kind
    device = geometry.device
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=geometry.dtype)

    num_blocks = geometry.num_logical_blocks - 1
    # Block 0 is vLLM's null block; the others are handed out in any order
    ids = 1 + torch.randperm(num_blocks, generator=generator, device=device)
    for start in range(0, num_blocks, ADDED_BLOCKS):
        part = ids[start : start + ADDED_BLOCKS]
        keys = draw(len(part), geometry.num_kv_heads, geometry.block_size, geometry.head_dim)
        selector.add_blocks(part, [keys] * len(geometry.anchor_layers))
    block_ids = ids.int().view(num_rows, -1)
    width, num_queries = block_ids.shape[1], QUERY_WINDOW if first else kind.num_queries or TAU
    queries = draw(len(geometry.anchor_layers), num_rows, num_queries, geometry.num_query_heads, geometry.head_dim)
    memory = torch.zeros(len(kind.channels), geometry.num_groups, num_rows, width, device=device)
    in_set = torch.zeros(geometry.num_groups, num_rows, width, dtype=torch.int8, device=device)
    in_set[:, :, -int(RESIDENT_RATIO * width) :] = 1
    num_known, elapsed = (0, 0) if first else (width, TAU)
    rows = [
        DueRequest(place, width, num_queries - 1, num_queries, elapsed, num_known, int(not first))
        for place in range(num_rows)
    ]
    due, state = due_rows(rows, device, is_entering=first), PlaceState(queries, block_ids, memory, in_set)

    def call() -> torch.Tensor:
        selector.remember(due, state)
        return memory

    return call


def bytes_read(selector: Selector, num_blocks: int) -> int:
    """Device bytes that have to be read for so many blocks; what is written and read again is not counted."""
    index_bytes = num_blocks * selector.bytes_per_block()
    if not isinstance(selector, NeuralSelector):
        return index_bytes
    weights = selector.model.named_parameters()
    return index_bytes + sum(weight.nbytes for name, weight in weights if not name.startswith("key_"))


def measure_host(call: Callable[[], object]) -> float:
    """Median microseconds until a call returns, with no other work on the device."""
    micros = []
    for _ in range(HOST_RUNS):
        started = time.perf_counter()
        call()
        micros.append(1e6 * (time.perf_counter() - started))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return statistics.median(micros)


def measure_selection(
    name: str,
    batch: tuple[int, int],
    device: torch.device,
    measure: Measure,
    ceiling: float,
    facts: Mapping[str, Any],
) -> SelectionRow:
    """Time one selector.

    Args:
        name: of `SELECTORS`.
        batch: rows that are due, and tokens of each.
        device: where the index lies.
        measure: microseconds of a call on the device.
        ceiling: GB/s of a plain copy.
        facts: fields of every row that say where it comes from.
    """
    num_rows, num_tokens = batch
    num_blocks = num_rows * (num_tokens // BLOCK_SIZE)
    selector = make_selector(name, make_geometry(num_blocks * BLOCK_SIZE, device))
    call = make_call(selector, num_rows, first=name == FIRST)
    micros = measure(call)
    num_bytes = bytes_read(selector, num_blocks)
    rate = num_bytes / micros / 1e3
    return SelectionRow(
        scenario="selection",
        measurement=f"{name} {num_rows} x {num_tokens} tokens",
        value=round(micros, 2),
        unit="us",
        host_us=round(measure_host(call), 2),
        device_bytes=num_bytes,
        gb_per_s=round(rate, 2),
        ceiling_gb_per_s=round(ceiling, 2),
        share=round(rate / ceiling, 4),
        index_bytes_per_token=selector.bytes_per_block() / BLOCK_SIZE,
        kv_bytes_per_token=KV_BYTES_PER_TOKEN,
        **facts,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the rows and write them; one index is allocated at a time.

    Raises:
        ConfigError: a row has no tokens to choose from, or there is none.
        UnsupportedError: there is no CUDA device.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written anew")
    parser.add_argument("--selectors", nargs="+", choices=SELECTORS, default=SELECTORS, help="default: all")
    batches = " ".join(f"{num_rows}x{num_tokens}" for num_rows, num_tokens in BATCHES)
    parser.add_argument("--batches", nargs="+", default=batches.split(), help=f"rows x tokens. Default: {batches}")
    parser.add_argument("--commit", default="unknown", help="commit to name in the rows. Default: %(default)s")
    options = parser.parse_args(argv)
    chosen = [_batch(given) for given in options.batches]
    if not torch.cuda.is_available():
        raise UnsupportedError("the selection benchmark needs a CUDA device; this machine has none")
    ceiling = measure_ceilings(measure_cuda)["device"]
    facts = row_facts(MODULE, argv, options.commit)
    rows: list[SelectionRow] = []
    device = torch.device("cuda")
    for batch, name in product(chosen, options.selectors):
        row = measure_selection(name, batch, device, measure_cuda, ceiling, facts)
        rows.append(row)
        sys.stdout.write(f"{row.measurement:32} {row.value:9.2f} us {row.host_us:9.2f} us host {row.share:7.1%}\n")
        sys.stdout.flush()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, [asdict(row) for row in rows])
    return 0


def _batch(given: str) -> tuple[int, int]:
    """Rows and tokens of `ROWSxTOKENS`."""
    num_rows, _, num_tokens = given.partition("x")
    smallest = 16 * BLOCK_SIZE
    if not (num_rows.isdecimal() and num_tokens.isdecimal() and int(num_rows) and int(num_tokens) >= smallest):
        raise ConfigError(f"--batches is {given!r}: allowed is ROWSxTOKENS, {smallest} tokens or more")
    return int(num_rows), int(num_tokens)


if __name__ == "__main__":
    sys.exit(main())
