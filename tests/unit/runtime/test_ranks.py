"""Ranks of one model hold different blocks, yet must agree on which steps may replay a captured graph."""

from pathlib import Path
from random import Random

from flashmemory_vllm.observability.counters import CounterReader, CounterWriter, worker_name
from tests.unit.residency.scheduler_twin import Request, SchedulerTwin
from tests.unit.runtime.runtimes import BLOCK, TinyModel, small_budget

NUM_SLOTS, NUM_BLOCKS, NUM_STEPS = 56, 300, 120
# Among them 5 steps like decode in which one rank streams and the other does not.
SEEDS = (3, 4)
POLICY = small_budget()


def arriving(random: Random) -> list[Request]:
    """Prompts of a few families, most asked again: found in the prefix cache up to their last token."""
    requests = []
    for uid in range(16):
        num_prompt = BLOCK * random.choice([8, 12, 20]) + 1
        requests.append(Request(f"r{uid}", uid, random.randrange(2), num_prompt, num_prompt, random.randint(2, 30)))
    return requests


def run_history(ranks: list[TinyModel], seed: int) -> list[tuple[bool, list[bool]]]:
    """For each step whether it looks like decode, and which ranks needed Python in it."""
    random = Random(seed)
    scheduler = SchedulerTwin(POLICY, NUM_BLOCKS, NUM_SLOTS, random)
    requests, steps = arriving(random), []
    for _ in range(NUM_STEPS):
        if requests and random.random() < 0.3:
            scheduler.waiting.append(requests.pop())
        step = scheduler.schedule()
        steps.append((set(step.num_scheduled_tokens.values()) == {1}, [rank.step(step) for rank in ranks]))
        scheduler.step_done(step)
    return steps


def test_all_ranks_keep_the_same_steps_out_of_full_graphs(tmp_path: Path) -> None:
    steps, streamed = [], []
    for seed in SEEDS:
        with (
            CounterWriter.create(tmp_path / "0", worker_name(0)) as one,
            CounterWriter.create(tmp_path / "1", worker_name(1)) as other,
        ):
            ranks = [
                TinyModel(counters, POLICY, NUM_SLOTS, NUM_BLOCKS, rank, selector="mean", tau_steps=3)
                for rank, counters in enumerate((one, other))
            ]
            steps += run_history(ranks, seed)
            streamed += [CounterReader(writer.path.parent).read()["streamed_blocks_total"] for writer in (one, other)]
    assert all(len(set(needed)) == 1 for _, needed in steps)
    like_decode = [needed[0] for is_decode, needed in steps if is_decode]
    assert any(like_decode), "no prompt ended with one token"
    assert not all(like_decode), "decode alone needs no Python"
    assert streamed[::2] != streamed[1::2], "the ranks chose the same blocks"
