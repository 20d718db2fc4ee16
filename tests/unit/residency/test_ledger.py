"""The ledger: the books always balance, and nobody waits for ever."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmemory_vllm.errors import ConfigError, IntegrityError
from flashmemory_vllm.residency.budget import Mode
from flashmemory_vllm.residency.ledger import SlotLedger
from tests.unit.residency.test_budget import make_policy


def test_ledger_refuses_a_server_that_could_hang() -> None:
    policy = make_policy()
    SlotLedger(policy.worst_case() + 1, policy)
    with pytest.raises(ConfigError, match="max_model_len 131072"):
        SlotLedger(policy.worst_case(), policy)


def test_ledger_counts_an_old_reserve_as_free() -> None:
    policy = make_policy(max_model_len=4096)
    ledger = SlotLedger(policy.worst_case() + 1, policy)
    assert ledger.can_admit("a", 4096, 4096)
    ledger.commit("a", 4096, 4096)
    assert ledger.reserved == 256
    assert ledger.can_admit("a", 4096, 4096)
    assert not ledger.can_admit("b", 16, 16)
    assert ledger.refused == 1
    with pytest.raises(IntegrityError, match="request b needs 1 slots next to 256"):
        ledger.commit("b", 16, 16)
    ledger.commit("a", 4096, 4095)
    assert ledger.reserved == policy.most_held(4096)
    assert ledger.can_admit("b", 16, 16)
    ledger.release("a")
    ledger.release("a")
    assert ledger.reserved == 0
    ledger.check_integrity()


def test_ledger_admits_exactly_what_there_is() -> None:
    policy = make_policy(max_model_len=4096)
    ledger = SlotLedger(policy.worst_case() + 1, policy)
    ledger.commit("a", 16, 16)
    left = ledger.capacity - ledger.reserved
    fitting = next(tokens for tokens in range(16, 4096, 16) if policy.reserve(tokens + 16, tokens + 16) > left)
    assert policy.reserve(fitting, fitting) == left
    assert policy.reserve(fitting + 16, fitting + 16) == left + 1
    assert ledger.can_admit("b", fitting, fitting)
    assert not ledger.can_admit("b", fitting + 16, fitting + 16)


def test_a_running_request_is_not_refused_for_growth_that_may_never_come() -> None:
    policy = make_policy(min_sparse_tokens=10**6, growth_reserve_tokens=1024, max_model_len=2048)
    ledger = SlotLedger(policy.worst_case() + 1, policy)
    ledger.commit("a", 17, 16)
    ledger.commit("b", 17, 16)
    left = ledger.capacity - ledger.reserved
    assert left < policy.reserve(17, 16)
    assert not ledger.can_admit("c", 17, 16)
    longer = 17 + 1024
    assert ledger.can_admit("a", longer, 16)
    ledger.commit("a", longer, 16)
    assert ledger.reserved == ledger.capacity
    ledger.check_integrity()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    growth=st.sampled_from([0, 64, 1024, 1000, 7]),
    mode=st.sampled_from(["always", "pressure"]),
    min_sparse=st.sampled_from([0, 100, 400, 403]),
)
def test_what_is_remembered_is_what_would_be_answered(seed: int, growth: int, mode: Mode, min_sparse: int) -> None:
    """Requests come, grow by a token a step and end; one ledger remembers, another one works out all anew."""
    numbers = random.Random(seed)
    policy = make_policy(
        min_sparse_tokens=min_sparse, max_num_batched_tokens=128, max_model_len=1200, growth_reserve_tokens=growth
    )
    policy = replace(policy, mode=mode)
    num_slots = numbers.randint(policy.worst_case() + 1, 300)
    remembers, asks = SlotLedger(num_slots, policy), SlotLedger(num_slots, policy)
    length, prompt = dict[str, int](), dict[str, int]()

    def both(req_id: str, num_tokens: int) -> bool:
        arguments = req_id, num_tokens, prompt[req_id]
        may = asks.can_admit(*arguments)
        if may:
            asks.commit(*arguments)
        is_covered = remembers.covers(req_id, num_tokens)
        assert (is_covered or remembers.can_admit(*arguments)) == may
        if may and not is_covered:
            remembers.commit(*arguments)
        assert remembers.reserved == asks.reserved
        return may

    for step in range(100):
        if numbers.random() < 0.2:
            prompt[f"r{step}"] = numbers.randint(1, 600)
            if both(f"r{step}", min(128, prompt[f"r{step}"])):
                length[f"r{step}"] = min(128, prompt[f"r{step}"])
        for req_id, before in [*length.items()]:
            after = min(before + 128, prompt[req_id]) if before < prompt[req_id] else before + 1
            if after < 1200 and numbers.random() > 0.01 and both(req_id, after):
                length[req_id] = after
                continue
            del length[req_id]
            for ledger in (remembers, asks):
                ledger.release(req_id)
        remembers.check_integrity()


def test_a_row_is_covered_until_it_begins_a_block() -> None:
    policy = make_policy(min_sparse_tokens=0)
    ledger = SlotLedger(policy.worst_case() + 1, policy)
    ledger.commit("a", 16, 16)
    assert not ledger.covers("a", 16), "it prefills"
    ledger.commit("a", 17, 16)
    assert all(ledger.covers("a", num_tokens) for num_tokens in range(17, 33))
    assert not ledger.covers("a", 33)
    assert not ledger.covers("a", 16)
    assert not ledger.covers("b", 17)
