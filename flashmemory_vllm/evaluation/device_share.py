"""The same device bytes for every selector: what its index keys take, its resident blocks do not get."""

from math import floor

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.evaluation.accuracy_rows import Setting
from flashmemory_vllm.residency.budget import cdiv

# Beside the sink: the block that is written, which is recent, and one to choose
_LEAST_BESIDE_SINK = 2


def ratio_for_share(device_share: float, index_bytes: int, block_bytes: int) -> float:
    """The resident ratio that a share of a request's bytes leaves.

    All blocks of a request have index keys, and the resident ones have keys and values as well. So with n blocks
    `n * ratio * block_bytes + n * index_bytes` is to be `n * device_share * block_bytes`.

    Args:
        device_share: bytes on the device over the bytes of all keys and values.
        index_bytes: bytes of a block's index keys.
        block_bytes: bytes of a block's keys and values over all layers.

    Returns:
        The ratio; 0 or less where the index keys alone take the share.
    """
    return device_share - index_bytes / block_bytes


def why_unaffordable(setting: Setting, num_tokens: int, block_size: int) -> str | None:
    """Why a setting cannot serve a prompt within its share of the device's bytes; None if it can, or has no share.

    A smaller budget would silently be raised: decode never does with less than the sink, a recent block and one to
    choose (`BudgetPolicy.decode_budget`).

    Args:
        setting: how a resident set is kept.
        num_tokens: tokens of the prompt.
        block_size: tokens in a block.
    """
    if setting.device_share is None:
        return None
    num_blocks = cdiv(num_tokens, block_size)
    left = max(0, floor(setting.ratio * num_blocks))
    least = min(num_blocks, cdiv(FlashMemoryConfig().sink_tokens, block_size) + _LEAST_BESIDE_SINK)
    if left >= least:
        return None
    return (
        f"of a device share of {setting.device_share:.1%} the index keys take "
        f"{setting.device_share - setting.ratio:.1%}, which leaves {left} of {num_blocks} blocks; the smallest "
        f"resident set has {least}"
    )
