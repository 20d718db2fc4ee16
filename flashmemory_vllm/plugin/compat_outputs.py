"""The part of `compat` that turns broken KV into an error of the requests that hold it; the same rules apply."""

import functools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from flashmemory_vllm.plugin.broken_pages import BROKEN_KV, BrokenBlocks, OutputsOfRanks
from flashmemory_vllm.plugin.names import CPU_WORKER, CUDA_WORKER

_MARK = "__flashmemory__"


def fail_requests_with_broken_blocks() -> None:
    """Let vLLM's scheduler fail every request that holds a block which the worker names, and forget the block.

    Symptom: without a KV connector the scheduler computes lost blocks again, which moves a running request back,
    and it leaves a lost block that no running request holds in the prefix cache. Cure: wrap its
    `update_from_output`, which for such an output sets the policy "fail", takes the blocks out of the prefix
    cache first, and afterwards writes the cause into the outputs of what has failed.
    Remove when `kv_load_failure_policy` can be set without a connector and an error can carry its cause.
    """
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import FinishReason

    original = Scheduler.update_from_output
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        broken = model_runner_output.kv_connector_output
        if not isinstance(broken, BrokenBlocks):
            return original(self, scheduler_output, model_runner_output)
        blocks = broken.invalid_block_ids
        self.recompute_kv_load_failures = False
        self.kv_cache_manager.evict_blocks(blocks)
        for req_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(req_id)
            if request is not None and request.num_stale_output_tokens:
                # Preempted since: its token may come from a broken block. It is computed again with the others.
                request.drop_stale_output = True
        held = {
            request.request_id
            for request in self.running
            if not blocks.isdisjoint(self.kv_cache_manager.get_block_ids(request.request_id)[0])
        }
        outputs = original(self, scheduler_output, model_runner_output)
        for of_client in outputs.values():
            for output in of_client.outputs:
                if output.request_id in held and output.finish_reason == FinishReason.ERROR:
                    output.stop_reason = BROKEN_KV
        return outputs

    setattr(update_from_output, _MARK, True)
    Scheduler.update_from_output = update_from_output


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
