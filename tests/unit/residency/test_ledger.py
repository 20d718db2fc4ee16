"""The ledger: the books always balance, and nobody waits for ever."""

import pytest

from flashmemory_vllm.errors import ConfigError, IntegrityError
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
