"""What becomes of a scheduler's output, for both model runners. vLLM is not imported."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.plugin.translate import StepTranslator
from flashmemory_vllm.residency.types import NewRequest, RunningRequest
from tests.docs.pages import ROOT


def new(req_id: str, blocks: list[int], computed: int, prompt_len: int, prefill: list[int] | None = None) -> Any:
    return SimpleNamespace(
        req_id=req_id,
        block_ids=(blocks,),
        num_computed_tokens=computed,
        prompt_len=prompt_len,
        prefill_token_ids=prefill,
        prompt_token_ids=[0] * prompt_len,
        prompt_embeds=None,
    )


def output(new_requests: list[Any], cached: Any = None, **num_tokens: int) -> Any:
    nothing = SimpleNamespace(
        req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[], num_output_tokens=[]
    )
    return SimpleNamespace(
        kv_cache_block_copies=None,
        new_block_ids_to_zero=None,
        finished_req_ids=set(),
        preempted_req_ids=None,
        scheduled_new_reqs=new_requests,
        scheduled_cached_reqs=cached or nothing,
        num_scheduled_tokens=num_tokens,
    )


def cached(req_id: str, blocks: list[int] | None, computed: int, outputs: int, *, resumed: bool) -> Any:
    return SimpleNamespace(
        req_ids=[req_id],
        resumed_req_ids={req_id} if resumed else set(),
        new_block_ids=[None if blocks is None else (blocks,)],
        num_computed_tokens=[computed],
        num_output_tokens=[outputs],
    )


def test_a_request_that_v1_resumes_prefills_what_it_has_generated() -> None:
    translator = StepTranslator()
    translator.translate(output([new("a", [3, 4], 0, 7)], a=7))
    step = translator.translate(output([], cached("a", [5, 6, 7], 4, 2, resumed=True), a=5))
    assert step.new == (NewRequest("a", (5, 6, 7), 4, 9, 7),)
    assert step.running == ()


def test_a_request_that_v2_sends_again_prefills_all_its_tokens() -> None:
    step = StepTranslator().translate(output([new("a", [3, 4, 5], 0, 7, prefill=[0] * 9)], a=9))
    assert step.new == (NewRequest("a", (3, 4, 5), 0, 9, 7),)


def test_blocks_of_the_managed_group_are_meant() -> None:
    request, more = new("a", [3, 4], 0, 7), cached("a", [8], 7, 0, resumed=False)
    request.block_ids, more.new_block_ids = ([3, 4], [5, 6]), [([], [8])]
    translator = StepTranslator(1, has_native_groups=True)
    assert translator.translate(output([request], a=7)).new == (NewRequest("a", (5, 6), 0, 7, 7),)
    assert translator.translate(output([], more, a=1)).running == (RunningRequest("a", (8,), 7),)


def test_only_blocks_of_other_groups_may_be_copied_or_zeroed() -> None:
    step = output([])
    step.new_block_ids_to_zero = [7]
    assert StepTranslator(1, has_native_groups=True).translate(step).new == ()
    with pytest.raises(IntegrityError, match="vllm asked to copy or zero KV blocks"):
        StepTranslator().translate(step)


def test_a_running_request_may_get_no_blocks() -> None:
    translator = StepTranslator()
    translator.translate(output([new("a", [3, 4], 0, 7)], a=7))
    step = translator.translate(output([], cached("a", None, 7, 0, resumed=False), a=1))
    assert (step.step, step.running) == (2, (RunningRequest("a", (), 7),))


def test_nowhere_is_the_first_group_taken_for_ours() -> None:
    first = re.compile(r"(block_ids|kv_cache_groups|by_group|slot_mappings|single_type_managers)\[0\]")
    modules = sorted((ROOT / "flashmemory_vllm").rglob("*.py"))
    assert modules
    assert [str(path) for path in modules if first.search(path.read_text(encoding="utf-8"))] == []
