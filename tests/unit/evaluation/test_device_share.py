"""A share of the device's bytes is spent on index keys first, and refused where too little is left."""

import pytest

from flashmemory_vllm.evaluation.accuracy_rows import Setting
from flashmemory_vllm.evaluation.device_share import ratio_for_share, why_unaffordable
from flashmemory_vllm.residency.budget import BudgetPolicy


@pytest.mark.parametrize("index_bytes", [0, 16, 250])
def test_resident_blocks_and_index_keys_take_the_share_together(index_bytes: int) -> None:
    ratio = ratio_for_share(0.4, index_bytes, 1000)
    num_blocks = 128
    assert num_blocks * (ratio * 1000 + index_bytes) == pytest.approx(num_blocks * 0.4 * 1000)


@pytest.mark.parametrize("num_tokens", [1024, 2048, 8192])
@pytest.mark.parametrize("ratio", [-0.1, 0.0, 0.02, 0.05, 0.1, 0.125, 0.5])
def test_refused_is_what_the_budget_of_decode_would_exceed(num_tokens: int, ratio: float) -> None:
    reason = why_unaffordable(Setting("exact", 16, ratio, 1, device_share=0.5), num_tokens, 32)
    if ratio <= 0:
        assert reason is not None
        return
    policy = BudgetPolicy(32, ratio, 0, 64, 256, 2048, 1 << 14, 512)
    exceeds = policy.decode_budget(num_tokens) > ratio * (num_tokens // 32)
    assert (reason is not None) == exceeds


def test_a_reason_names_what_takes_the_share() -> None:
    reason = why_unaffordable(Setting("exact", 16, -0.115, 1, device_share=0.135), 2048, 32)
    assert reason == (
        "of a device share of 13.5% the index keys take 25.0%, which leaves 0 of 64 blocks; the smallest resident set "
        "has 4"
    )


def test_a_ratio_is_taken_as_it_is() -> None:
    assert why_unaffordable(Setting("exact", 16, 0.001, 1), 2048, 32) is None
