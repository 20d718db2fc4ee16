"""From a wrong page to what the client reads, piece by piece, on vLLM's own classes."""

import asyncio
from collections.abc import AsyncGenerator
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import RetryableRequestError
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from flashmemory_vllm.plugin import compat_outputs
from flashmemory_vllm.plugin.broken_pages import BROKEN_KV, BrokenBlocks, OutputsOfRanks, PageJudge
from flashmemory_vllm.plugin.names import CPU_WORKER, CUDA_WORKER
from flashmemory_vllm.runtime.runtime import ResidencyRuntime
from flashmemory_vllm.transfer.checksums import Comparison
from flashmemory_vllm.transfer.engine import TransferCounters


class Landing:
    """A comparison that is over once it is waited for."""

    def __init__(self) -> None:
        self.is_over = False

    def query(self) -> bool:
        return self.is_over

    def wait(self, stream: object = None) -> None:
        raise AssertionError(stream)

    def synchronize(self) -> None:
        self.is_over = True


def comparison(*wrong: list[int], landed: Landing | None = None) -> Comparison:
    """Of blocks 10, 11, ... by layer."""
    return Comparison(np.arange(10, 10 + len(wrong[0])), torch.tensor(wrong, dtype=torch.uint8), landed)


def runtime(*comparisons: Comparison) -> ResidencyRuntime:
    """What a judge asks of a runtime."""
    left = list(comparisons)

    def take() -> tuple[Comparison, ...]:
        taken = tuple(left)
        left.clear()
        return taken

    return cast(ResidencyRuntime, SimpleNamespace(take_comparisons=take, moved=TransferCounters()))


class Promise(AsyncModelRunnerOutput):  # type: ignore[misc]
    """An output that is asked for later."""

    def get_output(self) -> ModelRunnerOutput:
        return ModelRunnerOutput(["a"], {"a": 0}, [[1]])


@pytest.mark.parametrize("output", [ModelRunnerOutput(["a"], {"a": 0}), EMPTY_MODEL_RUNNER_OUTPUT])
def test_a_wrong_page_is_named_in_the_output_of_its_step(output: ModelRunnerOutput) -> None:
    broken = runtime(comparison([0, 0, 0], [0, 1, 0]), comparison([0], [0]))
    judged = PageJudge(0).judged(output, broken)
    assert isinstance(judged.kv_connector_output, BrokenBlocks)
    assert judged.kv_connector_output.invalid_block_ids == {11}
    assert broken.moved.wrong_pages == 1
    assert EMPTY_MODEL_RUNNER_OUTPUT.kv_connector_output is None, "vLLM has one object for all such steps"


def test_right_pages_change_nothing() -> None:
    output = ModelRunnerOutput(["a"], {"a": 0})
    assert PageJudge(0).judged(output, runtime(comparison([0, 0]))) is output
    assert PageJudge(0).judged(output, runtime()) is output
    assert PageJudge(0).judged(output, None) is output
    assert output.kv_connector_output is None


def test_a_step_without_an_output_yet_is_judged_with_its_tokens() -> None:
    broken = runtime(comparison([1]))
    judge = PageJudge(0)
    assert judge.judged(None, broken) is None
    assert judge.judged(ModelRunnerOutput(["a"], {"a": 0}), broken).kv_connector_output.invalid_block_ids == {10}


def test_a_promise_is_judged_when_it_is_kept() -> None:
    landed = Landing()
    judged = PageJudge(0).judged(Promise(), runtime(comparison([0, 1], landed=landed)))
    assert not landed.query(), "the host must not wait while the step runs"
    output = judged.get_output()
    assert landed.query()
    assert (output.sampled_token_ids, output.kv_connector_output.invalid_block_ids) == ([[1]], {11})


@pytest.mark.parametrize("output", [ModelRunnerOutput(["a"], {"a": 0}), Promise()], ids=["output", "promise"])
def test_other_ranks_answer_with_what_is_broken_and_nothing_else(output: Any) -> None:
    landed, judge = Landing(), PageJudge(1)
    judged = judge.judged(output, runtime(comparison([0, 1], landed=landed)))
    assert not landed.query(), "the host must not wait while the step runs"
    assert judged.get_output() == BrokenBlocks(invalid_block_ids={11})
    assert judge.judged(output, runtime(comparison([0, 0]))).get_output() is None
    assert judge.judged(output, runtime()) is None


def test_the_blocks_of_all_ranks_are_named_with_the_tokens_of_the_first() -> None:
    ranks, output = OutputsOfRanks(), ModelRunnerOutput(["a"], {"a": 0}, [[1]])
    assert ranks.aggregate([output, None, None]) is output
    of_others = [BrokenBlocks(invalid_block_ids={4}), None, BrokenBlocks(invalid_block_ids={5})]
    judged = ranks.aggregate([output, *of_others])
    assert (judged.sampled_token_ids, judged.kv_connector_output.invalid_block_ids) == ([[1]], {4, 5})
    assert isinstance(judged.kv_connector_output, BrokenBlocks)
    judged = ranks.aggregate([judged, BrokenBlocks(invalid_block_ids={6})])
    assert judged.kv_connector_output.invalid_block_ids == {4, 5, 6}
    assert ranks.aggregate([None, None]) is None, "the tokens come with the next call"


@pytest.mark.parametrize(("worker", "hears"), [(CPU_WORKER, True), (CUDA_WORKER, True), ("auto", False)])
def test_only_an_engine_of_ours_hears_every_rank(monkeypatch: pytest.MonkeyPatch, worker: str, hears: bool) -> None:
    heard = []

    def collective_rpc(self: Any, method: str, **kwargs: Any) -> None:
        del self
        heard.append((method, isinstance(kwargs["kv_output_aggregator"], OutputsOfRanks)))

    monkeypatch.setattr(MultiprocExecutor, "collective_rpc", collective_rpc)
    monkeypatch.setattr(MultiprocExecutor, "execute_model", MultiprocExecutor.execute_model)
    compat_outputs.hear_every_rank()
    executor: Any = object.__new__(MultiprocExecutor)
    executor.parallel_config = SimpleNamespace(worker_cls=worker)
    executor.output_rank, executor.kv_output_aggregator, executor.ec_output_aggregator = 0, None, None
    executor.execute_model(None)
    executor.sample_tokens(None)
    assert heard == [("execute_model", hears), ("sample_tokens", hears)]


class Pool:
    """The part of a block pool that is asked."""

    num_gpu_blocks = 3

    def __init__(self) -> None:
        self.evicted: set[int] = set()

    def evict_blocks(self, blocks: set[int]) -> None:
        self.evicted |= blocks


HELD = {"a": [3, 11, 7], "b": [4], "c": [11]}


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A scheduler of vLLM whose own `update_from_output` fails what holds block 11, and one request more."""

    def update_from_output(self: Any, scheduled: Any, output: Any) -> dict[int, EngineCoreOutputs]:
        del scheduled, output
        assert not self.recompute_kv_load_failures
        failed = [EngineCoreOutput(name, [], finish_reason=FinishReason.ERROR) for name in ("a", "b")]
        return {0: EngineCoreOutputs(outputs=[*failed, EngineCoreOutput("c", [5])])}

    monkeypatch.setattr(Scheduler, "update_from_output", update_from_output)
    monkeypatch.setattr(Scheduler, "_handle_invalid_blocks", Scheduler._handle_invalid_blocks)
    compat_outputs.fail_requests_with_broken_blocks(lambda scheduler: scheduler.manager)
    twin: Any = object.__new__(Scheduler)
    blocks = {name: [SimpleNamespace(block_id=block) for block in ids] for name, ids in HELD.items()}
    twin.manager = SimpleNamespace(block_pool=Pool(), req_to_blocks=blocks)
    twin.recompute_kv_load_failures = False
    twin.kv_cache_manager = SimpleNamespace(block_pool=Pool())
    twin.running = [SimpleNamespace(request_id=name) for name in "abc"]
    stale = {"d": 1, "a": 0}
    twin.requests = {
        name: SimpleNamespace(num_stale_output_tokens=count, drop_stale_output=False) for name, count in stale.items()
    }
    return twin


def test_the_scheduler_forgets_the_block_and_says_why_a_request_failed(scheduler: Any) -> None:
    scheduler.recompute_kv_load_failures = True
    output = ModelRunnerOutput(["a"], {"a": 0}, kv_connector_output=BrokenBlocks(invalid_block_ids={11}))
    scheduled = SimpleNamespace(num_scheduled_tokens={"a": 1, "d": 1, "gone": 1})
    outputs = scheduler.update_from_output(scheduled, output)[0].outputs
    assert [(one.request_id, one.stop_reason) for one in outputs] == [("a", BROKEN_KV), ("b", None), ("c", None)]
    assert scheduler.manager.block_pool.evicted == {11}
    assert scheduler.requests["d"].drop_stale_output, "a preempted request would deliver a token made from it"
    assert not scheduler.requests["a"].drop_stale_output


def test_other_outputs_go_by(scheduler: Any) -> None:
    scheduler.update_from_output(SimpleNamespace(num_scheduled_tokens={}), ModelRunnerOutput([], {}))
    assert scheduler.manager.block_pool.evicted == set()
    assert not scheduler.requests["d"].drop_stale_output


def test_beside_other_layers_all_that_was_computed_from_the_block_is_forgotten(scheduler: Any) -> None:
    """VLLM itself raises where there are several groups of blocks."""
    scheduler.kv_cache_config = SimpleNamespace(kv_cache_groups=["ours", "windows"])
    assert scheduler._handle_invalid_blocks({11}, {}) == {"a", "c"}
    assert scheduler.manager.block_pool.evicted == {11, 7}
    assert scheduler.kv_cache_manager.block_pool.evicted == {0, 1, 2}
    assert scheduler._handle_invalid_blocks({9}, {}) == set()


def _generated(monkeypatch: pytest.MonkeyPatch, *stop_reasons: str | None) -> list[str]:
    """Texts that a client of a request reads, one output for each reason, the last one finished."""
    closed = []

    async def generate(self: Any, *args: Any) -> AsyncGenerator[Any, None]:
        del self, args
        try:
            for index, reason in enumerate(stop_reasons):
                part = SimpleNamespace(text=f"t{index}", stop_reason=reason)
                yield SimpleNamespace(finished=index == len(stop_reasons) - 1, outputs=[part])
        finally:
            closed.append(True)

    async def read() -> list[str]:
        engine: Any = object.__new__(AsyncLLM)
        return [output.outputs[0].text async for output in engine.generate("prompt")]

    monkeypatch.setattr(AsyncLLM, "generate", generate)
    compat_outputs.raise_failed_requests()
    try:
        return asyncio.run(read())
    finally:
        assert closed


@pytest.mark.parametrize("others", [(), (None,)], ids=["its only answer", "one of several answers"])
def test_the_client_reads_why_and_that_it_may_ask_again(
    monkeypatch: pytest.MonkeyPatch, others: tuple[None, ...]
) -> None:
    with pytest.raises(RetryableRequestError) as raised:
        _generated(monkeypatch, None, BROKEN_KV, *others)
    response = create_error_response(raised.value)
    assert response.error.code == HTTPStatus.SERVICE_UNAVAILABLE
    assert response.error.message == BROKEN_KV


def test_answers_and_their_stop_reasons_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _generated(monkeypatch, None, "stop here") == ["t0", "t1"]
