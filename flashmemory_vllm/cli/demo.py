"""`flashmemory demo`: ask a real server for one needle of hundreds, with few of the blocks on its device."""

import argparse
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from flashmemory_vllm.cli.server import Server
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.observability.metrics import PREFIX
from flashmemory_vllm.reference import reference_model_path

NUM_PROMPT_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class Question:
    """One retrieval task.

    Attributes:
        prompt_ids: token ids of the whole prompt.
        text: the question at the prompt's end.
        answer: the only right answer.
        num_needles: needles in the prompt, of which one holds the answer.
    """

    prompt_ids: list[int]
    text: str
    answer: str
    num_needles: int


@dataclass(frozen=True, slots=True)
class Residency:
    """How much of a request's KV cache its decode steps had on the device.

    Attributes:
        ratio: mean share of the request's blocks that decode attended to.
        num_blocks: blocks of the request.
        num_slots: blocks that the device tensor has room for, the reserved one included.
    """

    ratio: float
    num_blocks: int
    num_slots: int


def make_question(num_tokens: int, seed: int) -> Question:
    """Build a prompt of exactly `num_tokens` tokens that hides many needles and asks for one."""
    from flashmemory_vllm.evaluation.tasks import make_samples
    from flashmemory_vllm.evaluation.vocabulary import NEEDLE, decode

    sample = make_samples("multikey", num_tokens, num_samples=1, seed=seed)[0]
    prompt_ids = [int(token) for token in sample.prompt_ids]
    return Question(
        prompt_ids=prompt_ids,
        text=decode(prompt_ids[sample.num_shared_tokens :]),
        # without <end>, which the server takes as the stop token
        answer=decode([int(token) for token in sample.answer_ids[:-1]]),
        num_needles=prompt_ids.count(NEEDLE),
    )


def measure(before: dict[str, float], after: dict[str, float], num_blocks: int) -> Residency:
    """Turn two readings of `/metrics` into the residency of the decode steps between them.

    Args:
        before: value by metric name, before the request.
        after: the same after it.
        num_blocks: blocks of the request.

    Raises:
        ConfigError: no decode step was counted in between.
    """
    resident, context = (
        after.get(PREFIX + name, 0.0) - before.get(PREFIX + name, 0.0)
        for name in ("decode_resident_blocks_total", "decode_context_blocks_total")
    )
    if not context:
        raise ConfigError("no decode step was counted: the server must run --attention-backend flashmemory")
    return Residency(resident / context, num_blocks, int(after[f"{PREFIX}slots_total"]) + 1)


def run(args: argparse.Namespace) -> int:
    """Serve, ask, compare; the exit code says whether the answer was right."""
    question = make_question(args.tokens, args.seed)
    with Server(reference_model_path(), args.config, args.startup_seconds) as server:
        num_blocks = ceil(args.tokens / server.read_block_size())
        before = server.read_metrics()
        print(f"asking for 1 of {question.num_needles} needles in {args.tokens:,} tokens", flush=True)
        answer = server.complete(question.prompt_ids, max_tokens=len(question.answer.split()) + 1)
        residency = measure(before, server.read_metrics(), num_blocks)
    return report(question, answer, residency)


def report(question: Question, answer: str, residency: Residency) -> int:
    """Print what was asked, answered and kept on the device; returns the exit code."""
    right = answer.split() == question.answer.split()
    num_resident = round(residency.ratio * residency.num_blocks)
    shrink = residency.num_blocks / residency.num_slots
    print(f"question      {question.text}")
    print(f"model         {answer.strip()}")
    print(f"right answer  {question.answer}   ({'the same' if right else 'NOT the same'})")
    print(f"resident      {num_resident} of {residency.num_blocks} blocks: {residency.ratio:.1%} of its KV")
    print(f"device        {residency.num_slots} slots: {shrink:.1f} times smaller than this request's KV")
    return 0 if right else 1


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `demo` command."""
    parser = subparsers.add_parser("demo", help="let the shipped model find a needle in 16K tokens")
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("configs/reference.yaml"),
        help="options of the server. Default: configs/reference.yaml of a checkout",
    )
    parser.add_argument(
        "--tokens", type=int, default=NUM_PROMPT_TOKENS, help=f"prompt tokens. Default: {NUM_PROMPT_TOKENS}"
    )
    parser.add_argument("--seed", type=int, default=0, help="which prompt and needle. Default: 0")
    parser.add_argument(
        "--startup-seconds", type=float, default=600.0, help="patience for the server to start. Default: 600"
    )
    parser.set_defaults(run=run)
