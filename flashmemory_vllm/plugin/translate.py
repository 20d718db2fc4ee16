"""Translates vLLM's scheduler output into the residency core's own step input."""

from typing import TYPE_CHECKING

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.types import NewRequest, RunningRequest, StepInput

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput


class StepTranslator:
    """Turns each SchedulerOutput into a StepInput.

    The runners disagree on how a preempted request comes back: V2 sends it as a new request with all its
    tokens, V1 as a cached one marked resumed. Both become a NewRequest here. Prompt lengths are remembered
    because a resumed V1 request names only its output length.

    A streaming-input session that goes on is a new request with a longer prompt, in both. Here the one before it has
    ended: what it asked for counts no more.

    Args:
        managed: index of the KV cache group of the managed layers, whose blocks are meant.
        has_native_groups: whether there are others, whose blocks vLLM copies and zeroes.
    """

    def __init__(self, managed: int = 0, *, has_native_groups: bool = False) -> None:
        self.managed = managed
        self._has_native_groups = has_native_groups
        self._prompt_len: dict[str, int] = {}
        self._step = 0

    def translate(self, scheduled: "SchedulerOutput") -> StepInput:
        """Translate one step.

        Raises:
            IntegrityError: vLLM asks to copy or zero blocks, and all blocks are ours. It zeroes them for state-space
                layers and caches of mixed precision, and copies them where hits end within a block.
        """
        others = scheduled.kv_cache_block_copies or scheduled.new_block_ids_to_zero
        if others and not self._has_native_groups:
            raise IntegrityError("vllm asked to copy or zero KV blocks: allowed are blocks that are written whole")
        self._step += 1
        for req_id in scheduled.finished_req_ids:
            self._prompt_len.pop(req_id, None)
        ended = [
            new.req_id
            for new in scheduled.scheduled_new_reqs
            if self._prompt_len.get(new.req_id, new.prompt_len) != new.prompt_len
        ]
        cached = scheduled.scheduled_cached_reqs
        new = [self._new(request) for request in scheduled.scheduled_new_reqs]
        new += [
            self._resumed(cached, index)
            for index, req_id in enumerate(cached.req_ids if cached.resumed_req_ids else ())
            if req_id in cached.resumed_req_ids
        ]
        rows, resumed = (
            zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True),
            cached.resumed_req_ids,
        )
        running = [
            RunningRequest(req_id, self._ours(block_ids) if block_ids else (), num_computed)
            for req_id, block_ids, num_computed in rows
            if req_id not in resumed
        ]
        return StepInput(
            step=self._step,
            finished=(*scheduled.finished_req_ids, *ended),
            preempted=tuple(scheduled.preempted_req_ids or ()),
            new=tuple(new),
            running=tuple(running),
            num_scheduled_tokens=scheduled.num_scheduled_tokens,
        )

    def _new(self, request: "NewRequestData") -> NewRequest:
        # V2 names all tokens of the request, V1 those of its prompt alone
        prompt_len = request.prompt_len
        prefill_len = prompt_len if request.prefill_token_ids is None else len(request.prefill_token_ids)
        self._prompt_len[request.req_id] = prompt_len
        return NewRequest(
            request.req_id, self._ours(request.block_ids), request.num_computed_tokens, prefill_len, prompt_len
        )

    def _resumed(self, cached: "CachedRequestData", index: int) -> NewRequest:
        req_id = cached.req_ids[index]
        prompt_len = self._prompt_len[req_id]
        return NewRequest(
            req_id,
            self._ours(cached.new_block_ids[index]),
            cached.num_computed_tokens[index],
            prompt_len + cached.num_output_tokens[index],
            prompt_len,
        )

    def _ours(self, block_ids: "tuple[list[int], ...] | None") -> tuple[int, ...]:
        return tuple(block_ids[self.managed]) if block_ids else ()
