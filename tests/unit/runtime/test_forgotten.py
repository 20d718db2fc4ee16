"""A runtime keeps nothing of requests that ended, however they did, but what the status page tells of the last."""

import gc
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import FunctionType, ModuleType
from typing import Any

import pytest

from flashmemory_vllm.observability.counters import CounterWriter, worker_name
from flashmemory_vllm.residency.budget import STEPS_TO_FORCE
from flashmemory_vllm.runtime.history import SelectionHistory
from tests.helpers.indexers import save_untrained
from tests.unit.residency.scheduler_twin import Request, SchedulerTwin
from tests.unit.runtime.runtimes import BLOCK, HEAD_DIM, KV_HEADS, QUERY_HEADS, TinyModel, small_budget

NUM_SLOTS, NUM_BLOCKS = 40, 60
POLICY = small_budget()


def requests_of(seed: int) -> list[Request]:
    random = Random(seed)
    lengths = [(random.randint(1, 80), random.randint(1, 30)) for _ in range(12)]
    return [
        Request(f"request-{uid}", uid, uid % 2, prompt // 2, prompt, more) for uid, (prompt, more) in enumerate(lengths)
    ]


def run_to_the_end(model: TinyModel, requests: list[Request]) -> int:
    """Run them all with some aborts, and the step in which vLLM tells of the last. Returns the preemptions."""
    random = Random(0)
    scheduler = SchedulerTwin(POLICY, NUM_BLOCKS, NUM_SLOTS, random)
    arriving = list(requests)
    while arriving or not scheduler.is_idle:
        if arriving and random.random() < 0.5:
            scheduler.waiting.append(arriving.pop())
        step = scheduler.schedule()
        model.step(step)
        scheduler.step_done(step)
        if scheduler.running and random.random() < 0.03:
            scheduler.finish(random.choice(scheduler.running))
    for _ in range(STEPS_TO_FORCE + 1):  # lists are known some steps later
        model.step(scheduler.schedule())
    return scheduler.num_preemptions


def texts_kept_by(root: object) -> Iterator[str]:
    """Every text that can be reached from an object."""
    seen, waiting = {id(root)}, [root]
    while waiting:
        found = waiting.pop()
        if isinstance(found, str):
            yield found
        elif not isinstance(found, type | ModuleType | FunctionType | SelectionHistory):
            # The collector does not ask a dict for keys that are texts
            kept = [*gc.get_referents(found), *(found if isinstance(found, dict) else ())]
            new = [one for one in kept if id(one) not in seen]
            seen.update(map(id, new))
            waiting.extend(new)


@pytest.mark.parametrize(("selector", "decays"), [("h2o", ()), ("neural", ()), ("neural", (0.0, 0.9))])
def test_nothing_is_kept_of_requests_that_ended(tmp_path: Path, selector: str, decays: tuple[float, ...]) -> None:
    options: dict[str, Any] = {"selector": selector}
    if selector == "neural":
        sizes = {"num_query_heads": QUERY_HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "block_size": BLOCK}
        options["indexer"] = str(
            save_untrained(tmp_path / "toy.safetensors", chunk_size=2, memory_decays=decays, **sizes)
        )
    requests = requests_of(0)
    ids = {request.req_id for request in requests}
    with CounterWriter.create(tmp_path / "flashmemory-test-0", worker_name(0)) as counters:
        model = TinyModel(counters, POLICY, NUM_SLOTS, NUM_BLOCKS, **options, tau_steps=3)
        assert run_to_the_end(model, requests) > 0
        assert not ids & set(texts_kept_by(model.runtime))
