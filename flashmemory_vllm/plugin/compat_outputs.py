"""The part of `compat` that turns broken KV into an error of the requests that hold it; the same rules apply."""

import functools
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from flashmemory_vllm.plugin.broken_pages import BROKEN_KV, BrokenBlocks, OutputsOfRanks
from flashmemory_vllm.plugin.names import CPU_WORKER, CUDA_WORKER

_MARK = "__flashmemory__"


def fail_requests_with_broken_blocks(manager_of: Callable[[Any], Any]) -> None:
    """Let vLLM's scheduler fail every request that holds a block which the worker names, and forget the block.

    Symptom: without a KV connector the scheduler computes lost blocks again, which moves a running request back,
    and it leaves a lost block that no running request holds in the prefix cache. Cure: wrap its
    `update_from_output`, which for such an output sets the policy "fail", takes the blocks out of the prefix
    cache first, and afterwards writes the cause into the outputs of what has failed. Where there are several groups of
    blocks vLLM raises instead, as it cannot know whose blocks are named: wrap `_handle_invalid_blocks`, too.
    Remove when `kv_load_failure_policy` can be set without a connector and an error can carry its cause.

    Args:
        manager_of: a scheduler's manager of the blocks that are ours.
    """
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import FinishReason

    original, handle = Scheduler.update_from_output, Scheduler._handle_invalid_blocks
    if hasattr(original, _MARK):
        return

    @functools.wraps(handle)
    def _handle_invalid_blocks(self: Any, invalid_block_ids: set[int], num_scheduled_tokens: dict[str, int]) -> Any:
        if len(self.kv_cache_config.kv_cache_groups) == 1:
            return handle(self, invalid_block_ids, num_scheduled_tokens)
        return _forget_what_follows(self, manager_of(self), invalid_block_ids)

    @functools.wraps(original)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        broken = model_runner_output.kv_connector_output
        if not isinstance(broken, BrokenBlocks):
            return original(self, scheduler_output, model_runner_output)
        blocks = broken.invalid_block_ids
        self.recompute_kv_load_failures = False
        manager = manager_of(self)
        manager.block_pool.evict_blocks(blocks)
        for req_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(req_id)
            if request is not None and request.num_stale_output_tokens:
                # Preempted since: its token may come from a broken block. It is computed again with the others.
                request.drop_stale_output = True
        held = set(_holders(self, manager, blocks))
        outputs = original(self, scheduler_output, model_runner_output)
        for of_client in outputs.values():
            for output in of_client.outputs:
                if output.request_id in held and output.finish_reason == FinishReason.ERROR:
                    output.stop_reason = BROKEN_KV
        return outputs

    setattr(update_from_output, _MARK, True)
    Scheduler.update_from_output, Scheduler._handle_invalid_blocks = update_from_output, _handle_invalid_blocks


def _holders(scheduler: Any, manager: Any, broken: set[int]) -> dict[str, list[int]]:
    """The running requests that hold a broken block, and of each its blocks from the first such one on."""
    found = {}
    for request in scheduler.running:
        ids = [block.block_id for block in manager.req_to_blocks.get(request.request_id, ())]
        if first := [index for index, block_id in enumerate(ids) if block_id in broken][:1]:
            found[request.request_id] = ids[first[0] :]
    return found


def _forget_what_follows(scheduler: Any, manager: Any, broken: set[int]) -> set[str]:
    """Take out of the prefix caches what was computed from broken blocks, and name the requests that must fail.

    Of native layers that is everything: a window that was computed from them may be nobody's by now.
    """
    holders = _holders(scheduler, manager, broken)
    manager.block_pool.evict_blocks({block_id for ids in holders.values() for block_id in ids})
    if holders:
        device_pool = scheduler.kv_cache_manager.block_pool
        device_pool.evict_blocks(set(range(device_pool.num_gpu_blocks)))
    return set(holders)


def hear_every_rank() -> None:
    """Let an engine read what each of its ranks answers to a step, not the first one only.

    Symptom: a page that another rank finds broken stays unknown to the scheduler, and an error there is logged while
    the other ranks wait for ever. Cure: wrap `MultiprocExecutor.execute_model`, which gives an executor of our workers
    the aggregator that vLLM gives to those with a KV connector: with one, all ranks answer.
    Remove when vLLM's executor takes an aggregator from the worker or its configuration.
    """
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    original = MultiprocExecutor.execute_model
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.kv_output_aggregator is None and self.parallel_config.worker_cls in {CPU_WORKER, CUDA_WORKER}:
            self.kv_output_aggregator = OutputsOfRanks()
        return original(self, *args, **kwargs)

    setattr(execute_model, _MARK, True)
    MultiprocExecutor.execute_model = execute_model


def raise_failed_requests() -> None:
    """Let a client read why its request has failed, and that it may ask again.

    Symptom: the API server answers a request that the engine has failed with "Internal server error". Cure: wrap
    `AsyncLLM.generate`, which raises vLLM's own error for requests that may be tried again where an output names
    broken KV as the cause; vLLM answers 503 with its text, or ends a stream with it.
    Remove when vLLM's error responses carry an output's `stop_reason`.
    """
    from vllm.exceptions import RetryableRequestError
    from vllm.v1.engine.async_llm import AsyncLLM

    original = AsyncLLM.generate
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    async def generate(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        async with aclosing(original(self, *args, **kwargs)) as outputs:
            async for output in outputs:
                # At once: where several answers are streamed, the output that says so is seldom the last
                if any(part.stop_reason == BROKEN_KV for part in output.outputs):
                    raise RetryableRequestError(BROKEN_KV)
                yield output

    setattr(generate, _MARK, True)
    AsyncLLM.generate = generate
