"""At a resident ratio of 0.3 whole decode steps in one graph write what eager steps write, and eager ones read right.

`python -m tests.gpu.exactness` measures this after its own cases, as rows of the case `sparse`. Two engines get the
same prompts and options: one eager, under the oracle of `tests/helpers/oracle.py`, which recomputes every attention
output from the logical KV and the resident sets; the other one with vLLM's full graphs. Requests start together, so
both compute the same batches. Sets change every eighth step: blocks come in while the set before is in force.

    questions  the shipped model and its indexer spell a needle after 144 other tokens: logits far from any tie
    random     a random Llama with the selector whose sets change most. Its text changes with any wrong byte, and with
               the last bits of a logit: vLLM's batch-invariant kernels keep those the same in both engines, and
               layers are not compiled in either
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.evaluation.questions import answer_len, make_questions
from flashmemory_vllm.evaluation.tasks import AnyTaskName
from flashmemory_vllm.reference import reference_indexer_path, reference_model_path
from tests.helpers.engine import EngineResult, EngineRun, run_engine
from tests.helpers.tiny_model import random_prompts, save_tiny_llama

Load: TypeAlias = Literal["questions", "random"]
RATIO = 0.3
BLOCK_SIZE = 32
# Room for the prompts of two rounds
NUM_LOGICAL_BLOCKS = {"cpu": 256, "cuda": 2304}
TASK: AnyTaskName = "late"
# Relative to the largest element of an output: an output and the weights that made it are rounded to the dtype
TOLERANCES = {"float32": 1e-5, "float16": 2.0**-8, "bfloat16": 2.0**-5}


@dataclass(frozen=True, slots=True)
class SparseRegime:
    """Where and how both engines run.

    Attributes:
        device: "cpu", where the second engine is eager as well, or "cuda".
        load: see the module.
        runner: vLLM's model runner.
        layer_groups: groups of layers with resident sets of their own.
        dtype: of weights, activations and KV cache.
        prompt_lens: tokens of each prompt.
        num_tokens: tokens generated for each prompt of the load `random`.
    """

    device: str
    load: Load
    runner: Literal["v1", "v2"]
    layer_groups: int
    dtype: Literal["float32", "bfloat16"]
    prompt_lens: Sequence[int]
    num_tokens: int = 200

    def __str__(self) -> str:
        return f"sparse-{self.device}-{self.runner}-{self.load}-{self.layer_groups}-{self.dtype}"


_LONG = tuple(range(1024, 3072, 128))
SPARSE_REGIMES = (
    SparseRegime("cpu", "questions", "v1", 1, "float32", (640, 704, 896, 1000)),
    SparseRegime("cpu", "random", "v1", 2, "float32", (300, 350, 420, 500), 64),
    *(
        SparseRegime("cuda", load, runner, groups, "bfloat16", _LONG)
        for load in ("questions", "random")
        for runner in ("v1", "v2")
        for groups in (1, 2)
    ),
)


@dataclass(frozen=True, slots=True)
class SparseRow:
    """One regime.

    Attributes:
        device: see `SparseRegime`, as are load, runner, layer_groups and dtype.
        mode: what the second engine runs: "graphs", or "eager" on a CPU.
        load: questions or random.
        dtype: of the model.
        runner: v1 or v2.
        layer_groups: resident sets of a request.
        case: sparse.
        ratio: resident ratio.
        prompts: prompts that run at once.
        rounds: times that as many prompts ran.
        tokens: tokens generated for each.
        texts: texts compared.
        identical: texts that are the same in every token.
        first_divergence: earliest token at which any two differ, None if none do.
        answers_right: answers of the second engine that are right, of `texts`; None for random prompts.
        slots: device slots of both engines.
        logical_blocks: blocks of both schedulers.
        evictions: blocks that gave up a slot in the second engine, like the following.
        recalls: blocks copied from host to device.
        prefetches: those that came in while decode went on.
        streamed: blocks that prefill read from the host.
        preemptions: requests preempted by either engine.
        oracle_rows: sparse decode rows that the oracle checked in the eager engine.
        oracle_outputs: attention outputs of all kinds of rows that it checked.
        oracle_max_error: largest deviation of one, relative to its largest element; None if it was no number.
        tolerance: what that may be.
        command: see `Provenance`, as are commit, gpu and versions.
        commit: commit of the checkout.
        gpu: name of the device.
        versions: version by distribution.
    """

    device: str
    mode: str
    load: Load
    dtype: str
    runner: str
    layer_groups: int
    case: str
    ratio: float
    prompts: int
    rounds: int
    tokens: int
    texts: int
    identical: int
    first_divergence: int | None
    answers_right: int | None
    slots: int
    logical_blocks: int
    evictions: int
    recalls: int
    prefetches: int
    streamed: int
    preemptions: int
    oracle_rows: int
    oracle_outputs: int
    oracle_max_error: float | None
    tolerance: float
    command: str
    commit: str
    gpu: str
    versions: dict[str, str]

    def __str__(self) -> str:
        place = "" if self.first_divergence is None else f" (first at token {self.first_divergence})"
        return (
            f"{self.device} {self.runner} {self.mode} {self.dtype} sparse {self.load}, {self.layer_groups} groups: "
            f"{self.identical} of {self.texts} texts identical{place}, {self.answers_right} right; {self.prefetches} "
            f"prefetches; oracle: {self.oracle_max_error} in {self.oracle_outputs} outputs: "
            f"{'; '.join(self.problems()) or 'as expected'}"
        )

    def problems(self) -> list[str]:
        """What this row shows to be wrong, with the machinery or with the measurement."""
        expected = {
            "texts differ": self.identical == self.texts,
            "an answer is wrong": self.answers_right in {None, self.texts},
            "an attention output is wrong": self.oracle_max_error is not None
            and self.oracle_max_error <= self.tolerance,
            "the oracle saw no sparse decode": self.oracle_rows > 0,
            "no block was evicted": self.evictions > 0,
            "nothing was prefetched": self.prefetches > 0,
            "nothing was streamed": self.streamed > 0,
            "a request was preempted": self.preemptions == 0,
        }
        return [problem for problem, is_fine in expected.items() if not is_fine]


@dataclass(frozen=True, slots=True)
class Work:
    """What both engines are asked.

    Attributes:
        model: folder of the model.
        options: of our section, which depend on the model.
        rounds: prompts, the third round the same as the first.
        answers: right answers to them, or None.
        num_tokens: tokens to generate for each.
    """

    model: Path
    options: dict[str, Any]
    rounds: list[list[list[int]]]
    answers: list[list[list[int]]] | None
    num_tokens: int


def make_work(regime: SparseRegime, folder: Path) -> Work:
    """Three rounds of prompts.

    Args:
        regime: for which.
        folder: for the random model, which is written if it is not there.
    """
    if regime.load == "random":
        model = folder / f"sparse-{regime.dtype}"
        if not model.exists():
            save_tiny_llama(model, dtype=getattr(torch, regime.dtype))
        prompts = [
            [random_prompts(1, length, length, seed=2 * length + second)[0] for length in regime.prompt_lens]
            for second in range(2)
        ]
        forgetful = {"memory_decay": 0.0, "question_share": 0.0, "successor_share": 0.0, "hysteresis": 0.0}
        return Work(model, {"selector": "exact", **forgetful}, [*prompts, prompts[0]], None, regime.num_tokens)
    asked = [
        [make_questions(TASK, length, 1, second, questions_per_context=1)[0] for length in regime.prompt_lens]
        for second in range(2)
    ]
    prompts, answers = (
        [[getattr(sample, name).tolist() for sample in one] for one in asked] for name in ("prompt_ids", "answer_ids")
    )
    options = {"indexer": str(reference_indexer_path())}
    rounds, right = [*prompts, prompts[0]], [*answers, answers[0]]
    return Work(reference_model_path(), options, rounds, right, answer_len(TASK))


def _count_slots(regime: SparseRegime, work: Work) -> int:
    """Slots for the sets of all requests and their first chunks, but not for the blocks of all."""
    blocks = [-(-(length + work.num_tokens) // BLOCK_SIZE) for length in regime.prompt_lens]
    return sum(blocks) // 2 + 1


def _run(regime: SparseRegime, work: Work, *, is_eager: bool) -> EngineRun:
    ours = {
        "resident_ratio": RATIO,
        "min_sparse_tokens": 0,
        "sink_tokens": BLOCK_SIZE,
        "recent_tokens": 2 * BLOCK_SIZE,
        "tau_steps": 8,
        "layer_groups": regime.layer_groups,
        "device_slots": _count_slots(regime, work),
        "growth_reserve_tokens": 0,
        "host_memory_gib": 1.0,
        "check_integrity": True,
        **work.options,
    }
    longest = max(regime.prompt_lens) + work.num_tokens
    engine: dict[str, Any] = {
        "dtype": regime.dtype,
        "block_size": BLOCK_SIZE,
        "max_model_len": -(-longest // 512) * 512,
        # More than there are: blocks of the host follow from it
        "max_num_seqs": 24,
        "max_num_batched_tokens": 512,
        "num_gpu_blocks_override": NUM_LOGICAL_BLOCKS[regime.device],
        "kv_cache_memory_bytes": 1 << 29,
        "enforce_eager": is_eager,
    }
    env = {}
    if regime.device == "cuda":
        engine |= {"gpu_memory_utilization": 0.2, "max_num_batched_tokens": 2048}
        env["VLLM_USE_V2_MODEL_RUNNER"] = "1" if regime.runner == "v2" else "0"
        if regime.load == "random":
            env["VLLM_BATCH_INVARIANT"] = "1"
            # Compiled layers round in other places
            engine["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    # The oracle looks at Python, which a graph leaves out
    return EngineRun(work.model, work.rounds, work.num_tokens, ours, engine, oracle=is_eager, env=env)


def measure_sparse(regime: SparseRegime, work: Work, provenance: Provenance) -> SparseRow:
    """Run both engines and compare.

    Args:
        regime: where and how.
        work: what they are asked.
        provenance: where the row comes from.
    """
    eager = run_engine(_run(regime, work, is_eager=True))
    # On a CPU it runs eager steps again: then nothing but the prompts may decide what is written
    second = _run(regime, work, is_eager=regime.device == "cpu")
    return _compare(regime, work, eager, run_engine(replace(second, oracle=False)), provenance)


def _compare(
    regime: SparseRegime, work: Work, eager: EngineResult, other: EngineResult, provenance: Provenance
) -> SparseRow:
    pairs = [pair for rounds in zip(eager.tokens, other.tokens, strict=True) for pair in zip(*rounds, strict=True)]
    diverged = [
        next((at for at, (one, two) in enumerate(zip(*pair, strict=False)) if one != two), 0)
        for pair in pairs
        if pair[0] != pair[1]
    ]
    right = None
    if work.answers is not None:
        told = zip(other.tokens, work.answers, strict=True)
        right = sum(got == answer for one, answers in told for got, answer in zip(one, answers, strict=True))
    checked = eager.checked
    errors = [one.max_error for one in checked.values()]
    worst = max(errors) if errors and all(error == error for error in errors) else None  # noqa: PLR0124
    counted = other.counters
    return SparseRow(
        device=regime.device,
        mode="graphs" if regime.device == "cuda" else "eager",
        load=regime.load,
        dtype=regime.dtype,
        runner=regime.runner,
        layer_groups=regime.layer_groups,
        case="sparse",
        ratio=RATIO,
        prompts=len(work.rounds[0]),
        rounds=len(work.rounds),
        tokens=work.num_tokens,
        texts=len(pairs),
        identical=len(pairs) - len(diverged),
        first_divergence=min(diverged, default=None),
        answers_right=right,
        slots=_count_slots(regime, work),
        logical_blocks=int(counted["host_blocks_total"]),
        evictions=int(counted["evictions_total"]),
        recalls=int(counted["recalled_blocks_total"]),
        prefetches=int(counted["prefetched_blocks_total"]),
        streamed=int(counted["streamed_blocks_total"]),
        preemptions=int(eager.metrics["preemptions"] + other.metrics["preemptions"]),
        oracle_rows=checked["sparse_decode"].rows if "sparse_decode" in checked else 0,
        oracle_outputs=sum(one.outputs for one in checked.values()),
        oracle_max_error=worst,
        tolerance=TOLERANCES[regime.dtype],
        **asdict(provenance),
    )
