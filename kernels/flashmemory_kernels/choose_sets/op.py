"""Public op `choose_sets`."""

import torch

from flashmemory_kernels.choose_sets.naive import LIST_HEADER, ChoicePolicy, choose_sets_naive
from flashmemory_kernels.common import expect_device, expect_dtype, expect_shape, runs_kernel
from flashmemory_kernels.common.due_rows import Due


def choose_sets(
    memory: torch.Tensor,
    in_set: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    policy: ChoicePolicy,
    short_list: torch.Tensor,
    long_list: torch.Tensor,
    *,
    is_checked: bool = False,
) -> None:
    """Choose the set of each row in each layer group and list who comes and who goes; mutates `in_set` and the lists.

    A block is worth `max(v[b], successor * v[b - 1]) * (1 + hysteresis * in_set[b])`, v what its channels are worth
    together; what is negative or not a number counts 0. Blocks that the memory does not know are worth more than any
    other, and of blocks of equal worth the newest is best. Of the blocks between sink and recent ones that are worth a
    slot the best `want` are chosen. As many come as are chosen and not in the set, the best `cap` of them at most; as
    many go, the worst of the set, as are too many then. So a set may keep for a while what was not chosen.

    A row of the short list is place, epoch, step, how many come, how many go, how many blocks are worth a slot, then
    L positions that come and L that go, ascending; behind those it says nothing. Neither is more than L: what is left
    is chosen again the next time. With a `LONG_START` the positions that come and then those that go stand in
    `long_list`, without gaps and without that limit, group g's from `long_start + g * (first_recent - sink_end)` on.
    Padding rows of the short list have place -1 and say nothing else.

    Afterwards the set is the sink, the recent blocks and the far ones that stayed or came; no other column is set.
    What rows say is trusted: checking it would stall the device.

    Args:
        memory: float32 [C, G, P, W], rows contiguous; columns from `num_blocks` on are not read.
        in_set: int8 [G, P, W], rows contiguous, 1 for blocks in the set.
        rows: int32 [n, len(Due)]; see `common.due_rows`.
        weights: float32 [C].
        policy: how channels become worth.
        short_list: int32 [n, G, 6 + 2 L].
        long_list: int32 [S].
        is_checked: an earlier call with such arguments was checked, which takes as long as a launch. Default: False.

    Raises:
        ValueError: shape, dtype, device or strides do not match, or the policy has another way to combine.
    """
    if not is_checked:
        _expect(memory, in_set, rows, weights, short_list, long_list)
    if policy.combine not in {"sum", "max"}:
        raise ValueError(f"policy: expected to combine by 'sum' or 'max', got {policy.combine!r}")
    if runs_kernel(memory):
        from flashmemory_kernels.choose_sets.kernel import choose_sets_triton

        choose_sets_triton(memory, in_set, rows, weights, policy, short_list, long_list)
    else:
        choose_sets_naive(memory, in_set, rows, weights, policy, short_list, long_list)


def _expect(
    memory: torch.Tensor,
    in_set: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    short_list: torch.Tensor,
    long_list: torch.Tensor,
) -> None:
    expect_shape("memory", memory, (None, None, None, None))
    num_channels, num_groups, num_places, width = memory.shape
    expect_shape("in_set", in_set, (num_groups, num_places, width))
    expect_shape("rows", rows, (None, len(Due)))
    expect_shape("weights", weights, (num_channels,))
    expect_shape("short_list", short_list, (len(rows), num_groups, None))
    expect_shape("long_list", long_list, (None,))
    if short_list.shape[2] < LIST_HEADER or short_list.shape[2] % 2:
        raise ValueError(
            f"short_list: expected {LIST_HEADER} columns and an even number more, got {short_list.shape[2]}"
        )
    for name, tensor, dtype in (
        ("memory", memory, torch.float32), ("in_set", in_set, torch.int8), ("rows", rows, torch.int32),
        ("weights", weights, torch.float32), ("short_list", short_list, torch.int32),
        ("long_list", long_list, torch.int32),
    ):  # fmt: skip
        expect_dtype(name, tensor, dtype)
        expect_device(name, tensor, memory.device)
    for name, tensor in (("memory", memory), ("in_set", in_set)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: expected a last dim of stride 1, got strides {tensor.stride()}")
    for name, tensor in (("rows", rows), ("weights", weights), ("short_list", short_list), ("long_list", long_list)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
