"""At a resident ratio of 1 our backend writes token for token what vLLM's own writes, while blocks come and go.

`python -m tests.gpu.exactness --out FILE` measures every case of this machine and writes a row for each; the
tests beside this file assert the same rows. A random Llama generates from three rounds of prompts, the third the
same as the first. The device has slots for one round and the host for all, so the second round evicts the first,
and the third finds its prompts in the prefix cache and has to recall them.

    steady      slots for a whole round: both engines schedule the same batches in every step
    preempting  fewer slots: our engine preempts requests, vLLM's does not

The batch that a token is computed in changes the last bits of its logits. The text is therefore only certain to
be the same where both engines run the same batches, or where fp32 keeps those bits far from any decision. vLLM's
FlashAttention has no fp32: on a GPU the preempting case reports how far the texts agree.

`--only hybrids` measures models with windows or states beside full attention, whose other layers stay vLLM's own.

Then come the regimes of `tests/gpu/sparse.py`, in which only some blocks are resident.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flashmemory_vllm.evaluation.provenance import Provenance
from tests.gpu.regimes import HYBRID_REGIMES, REGIMES, Case, Regime
from tests.gpu.sparse import SPARSE_REGIMES, SparseRow, make_work, measure_sparse
from tests.helpers.engine import EngineResult, EngineRun, run_engine
from tests.helpers.tiny_model import VOCABULARY

NUM_PROMPTS = 16
PROMPT_LENS = (180, 420)
NUM_LOGICAL_BLOCKS = 1024
MAX_MODEL_LEN = 2048
BLOCK_SIZE = 32
# A text of fewer different tokens hides what it was computed from
LEAST_DISTINCT = 4


@dataclass(frozen=True, slots=True)
class ExactnessRow:
    """One case in one regime.

    Attributes:
        device: see `Regime`, as are mode, dtype, runner and model.
        mode: eager, piecewise or graphs.
        dtype: of the model.
        runner: v1 or v2.
        model: of which kind.
        case: see the module.
        prompts: prompts that run at once.
        rounds: times that as many prompts ran.
        tokens: tokens generated for each.
        texts: texts compared.
        identical: texts that are the same in every token.
        first_divergence: earliest token at which any two differ, None if none do.
        distinct: different tokens of the text that has fewest of them.
        must_agree: whether a difference is an error.
        slots: device slots of our engine, the null slot included.
        logical_blocks: blocks of both schedulers; of hybrids those of our layers.
        evictions: blocks that gave up a slot.
        recalls: blocks copied from host to device.
        prefix_hits: prompt tokens found in the prefix cache.
        stock_prefix_hits: the same of vLLM's own backend.
        preemptions: requests preempted by our engine.
        stock_preemptions: the same of vLLM's own backend.
        command: see `Provenance`, as are commit, gpu and versions.
        commit: commit of the checkout.
        gpu: name of the device.
        versions: version by distribution.
    """

    device: str
    mode: str
    dtype: str
    runner: str
    model: str
    case: Case
    prompts: int
    rounds: int
    tokens: int
    texts: int
    identical: int
    first_divergence: int | None
    distinct: int
    must_agree: bool
    slots: int
    logical_blocks: int
    evictions: int
    recalls: int
    prefix_hits: int
    stock_prefix_hits: int
    preemptions: int
    stock_preemptions: int
    command: str
    commit: str
    gpu: str
    versions: dict[str, str]

    def __str__(self) -> str:
        place = "" if self.first_divergence is None else f" (first at token {self.first_divergence})"
        return (
            f"{self.model} {self.device} {self.runner} {self.mode} {self.dtype} {self.case}: {self.identical} of "
            f"{self.texts} texts identical{place}, {self.distinct} different tokens or more; "
            f"{self.evictions} evictions, {self.recalls} recalls, {self.prefix_hits} prefix hits, "
            f"{self.preemptions} preemptions: {'; '.join(self.problems()) or 'as expected'}"
        )

    def problems(self) -> list[str]:
        """What this row shows to be wrong, with the machinery or with the measurement."""
        steady = self.case == "steady"
        expected = {
            "a text says little": self.distinct > LEAST_DISTINCT,
            "texts differ": not self.must_agree or self.identical == self.texts,
            "no block was evicted": self.evictions > 0,
            "no block was recalled": self.recalls > 0,
            "no prefix was found": self.prefix_hits > 0,
            "prefix hits are shorter than vLLM's own": self.prefix_hits >= self.stock_prefix_hits,
            "vLLM's own engine preempted": self.stock_preemptions == 0,
            "a request was preempted": self.preemptions == 0 or not steady,
            "no request was preempted": self.preemptions > 0 or steady,
        }
        return [problem for problem, is_fine in expected.items() if not is_fine]


def make_rounds(seed: int = 0) -> list[list[list[int]]]:
    """Three rounds of random prompts, the third the same as the first.

    Every fourth prompt ends with the first token of a block: found in the prefix cache, it has one token left to
    compute, and its history has to be fetched for a step that looks like decode.
    """
    rng = random.Random(seed)

    def prompt(index: int) -> list[int]:
        length = rng.randint(*PROMPT_LENS)
        if index % 4 == 0:
            length = length // BLOCK_SIZE * BLOCK_SIZE + 1
        return [rng.randrange(2, VOCABULARY) for _ in range(length)]

    first, second = ([prompt(index) for index in range(NUM_PROMPTS)] for _ in range(2))
    return [first, second, first]


def count_slots(case: Case, num_tokens: int, rounds: Sequence[Sequence[Sequence[int]]]) -> int:
    """Device slots: for the largest round to its end, or for its prompts and half of what they generate."""
    grown = num_tokens if case == "steady" else num_tokens // 2
    largest = max(sum(-(-(len(prompt) + grown) // BLOCK_SIZE) for prompt in one) for one in rounds)
    return largest + 1


def make_run(regime: Regime, case: Case | None, model: Path, rounds: list[list[list[int]]]) -> EngineRun:
    """Our engine in one case, or vLLM's own backend without a case."""
    engine: dict[str, Any] = {
        "dtype": regime.dtype,
        "block_size": BLOCK_SIZE,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": NUM_PROMPTS,
        "max_num_batched_tokens": MAX_MODEL_LEN,
        "kv_cache_memory_bytes": 1 << 28,
        "enable_prefix_caching": True,
        "enforce_eager": regime.mode == "eager",
    }
    if not regime.is_hybrid:
        # With windows or states these are the blocks of those alone
        engine["num_gpu_blocks_override"] = NUM_LOGICAL_BLOCKS
    if regime.device == "cuda":
        engine["gpu_memory_utilization"] = 0.1
    if regime.device == "cuda" and regime.model == "qwen3-next":
        # vLLM's default on Hopper is compiled when it is first used
        engine["gdn_prefill_backend"] = "triton"
    if regime.mode == "piecewise":
        engine["compilation_config"] = {"cudagraph_mode": "PIECEWISE"}
    env = {}
    if regime.device == "cuda":
        env["VLLM_USE_V2_MODEL_RUNNER"] = "1" if regime.runner == "v2" else "0"
    if case is None:
        if regime.device == "cuda":
            engine["attention_backend"] = "FLASH_ATTN"
        return EngineRun(model, rounds, regime.num_tokens, engine=engine, env=env)
    ours = {
        "resident_ratio": 1.0,
        "selector": "full",
        "device_slots": count_slots(case, regime.num_tokens, rounds),
        # All prompts of a round are admitted at once
        "growth_reserve_tokens": 0,
        "host_memory_gib": 0.25,
        "check_integrity": True,
    }
    return EngineRun(model, rounds, regime.num_tokens, flashmemory=ours, engine=engine, env=env)


def compare(
    regime: Regime, case: Case, slots: int, stock: EngineResult, ours: EngineResult, provenance: Provenance
) -> ExactnessRow:
    """Make the row of one case, from what both engines returned."""
    pairs = [
        pair
        for stock_round, our_round in zip(stock.tokens, ours.tokens, strict=True)
        for pair in zip(stock_round, our_round, strict=True)
    ]
    diverged = [
        next(index for index, (expected, got) in enumerate(zip(*pair, strict=True)) if expected != got)
        for pair in pairs
        if pair[0] != pair[1]
    ]
    counted = ours.counters
    return ExactnessRow(
        device=regime.device,
        mode=regime.mode,
        dtype=regime.dtype,
        runner=regime.runner,
        model=regime.model,
        case=case,
        prompts=len(stock.tokens[0]),
        rounds=len(stock.tokens),
        tokens=regime.num_tokens,
        texts=len(pairs),
        identical=len(pairs) - len(diverged),
        first_divergence=min(diverged, default=None),
        distinct=min(len(set(text)) for text, _ in pairs),
        must_agree=regime.must_agree(case),
        slots=slots,
        logical_blocks=int(counted["host_blocks_total"]),
        evictions=int(counted["evictions_total"]),
        recalls=int(counted["recalled_blocks_total"]),
        prefix_hits=int(ours.metrics["prefix_cache_hits"]),
        stock_prefix_hits=int(stock.metrics["prefix_cache_hits"]),
        preemptions=int(ours.metrics["preemptions"]),
        stock_preemptions=int(stock.metrics["preemptions"]),
        **asdict(provenance),
    )


def measure(regime: Regime, provenance: Provenance, folder: Path, jobs: int = 1) -> list[ExactnessRow]:
    """Run vLLM's own engine and ours in every case, and compare.

    Args:
        regime: where and how.
        provenance: where the rows come from.
        folder: for the model, which is written if it is not there.
        jobs: engines that run at once.
    """
    rounds = make_rounds()
    model = regime.save_model(folder)
    runs = [make_run(regime, case, model, rounds) for case in (None, *regime.cases)]
    with ThreadPoolExecutor(jobs) as pool:
        stock, *ours = pool.map(run_engine, runs)
    return [
        compare(regime, case, count_slots(case, regime.num_tokens, rounds), stock, result, provenance)
        for case, result in zip(regime.cases, ours, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the regimes of this machine and write a row for each case; 1 if one has a problem."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.exactness", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written anew unless --append is given")
    parser.add_argument("--append", action="store_true", help="keep the rows that --out has")
    parser.add_argument("--jobs", type=int, default=1, help="engines that run at once. Default: 1")
    parser.add_argument("--only", default="", help="regimes whose name has this in it. Default: all of the device's")
    parser.add_argument("--commit", help="commit to name in the rows, where git is not there to ask")
    args = parser.parse_args(argv)
    provenance = Provenance.collect(["python", "-m", "tests.gpu.exactness", *sys.argv[1:]], args.commit)
    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.append and args.out.exists() else []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    has_problem = False
    for row in _measure_all("cuda" if torch.cuda.is_available() else "cpu", args.only, args.jobs, provenance):
        rows.append(asdict(row))
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()
        has_problem |= bool(row.problems())
    return int(has_problem)


def _measure_all(device: str, only: str, jobs: int, provenance: Provenance) -> Iterator[ExactnessRow | SparseRow]:
    """Rows of every regime of a device whose name has `only` in it, as they are measured."""
    with tempfile.TemporaryDirectory() as folder:
        for regime in REGIMES:
            if regime.device == device and only in str(regime):
                yield from measure(regime, provenance, Path(folder), jobs)
        hybrids = [regime for regime in HYBRID_REGIMES if regime.device == device and only in str(regime)]
        for regime in hybrids:
            regime.save_model(Path(folder))
        with ThreadPoolExecutor(jobs) as pool:
            for rows in pool.map(partial(measure, provenance=provenance, folder=Path(folder)), hybrids):
                yield from rows
        sparse = [regime for regime in SPARSE_REGIMES if regime.device == device and only in str(regime)]
        works = [make_work(regime, Path(folder)) for regime in sparse]
        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(partial(measure_sparse, provenance=provenance), sparse, works)


if __name__ == "__main__":
    sys.exit(main())
