"""Triton kernels of `choose_sets`, a program for each row and group: in registers, or for many blocks in several tiles.

No sort: the k-th largest worth is found by narrowing down its bit pattern, each time counting. It is the same on every
device, and of equal ones the newest stay.
"""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# NaN is what does not equal itself.
# ruff: noqa: ANN001, ANN201, PLR0124, PLR0913, PLR0917

import torch
import triton
import triton.language as tl

from flashmemory_kernels.choose_sets.naive import LIST_HEADER, ChoicePolicy
from flashmemory_kernels.common.due_rows import Due

PLACE, EPOCH, STEP = tl.constexpr(int(Due.PLACE)), tl.constexpr(int(Due.EPOCH)), tl.constexpr(int(Due.STEP))
IS_NEW, NUM_BLOCKS = tl.constexpr(int(Due.IS_NEW)), tl.constexpr(int(Due.NUM_BLOCKS))
SINK_END, FIRST_RECENT = tl.constexpr(int(Due.SINK_END)), tl.constexpr(int(Due.FIRST_RECENT))
END, WANT, CAP = tl.constexpr(int(Due.END)), tl.constexpr(int(Due.WANT)), tl.constexpr(int(Due.CAP))
LONG_START, FIELDS = tl.constexpr(int(Due.LONG_START)), tl.constexpr(len(Due))
HEADER = tl.constexpr(LIST_HEADER)

# Bit patterns of floats that are not negative ascend with them. This is the one behind infinity's.
BEHIND_INF = tl.constexpr(0x7F800001)
INT_MAX, SIGN = tl.constexpr(0x7FFFFFFF), tl.constexpr(-0x80000000)

# Most blocks of a request that is chosen for in registers, those that a warp holds, and the tile of longer ones.
SINGLE_TILE = 4096
ELEMS_PER_WARP = 256
WIDE_TILE = 4096
MAX_WARPS = 8


@triton.jit
def tile_worth(
    p_memory, p_weights, p_set, i_block, num_blocks, sink_end, first_recent, is_new,
    stride_channel, successor, hysteresis, threshold, C: tl.constexpr, IS_MAX: tl.constexpr,
):  # fmt: skip
    """Bit patterns of the worth of blocks, which of them are worth a slot, and which far ones are in the set."""
    m_candidate = (i_block >= sink_end) & (i_block < first_recent)
    m_own = m_candidate & (i_block < num_blocks)
    m_before = m_own & (i_block > 0)
    value = i_block.to(tl.float32) * 0.0
    before = value
    for channel in range(C):
        weight = tl.load(p_weights + channel)
        p_blocks = p_memory + tl.cast(channel, tl.int64) * stride_channel + i_block
        own = tl.load(p_blocks, m_own, other=0.0)
        own = tl.where(own == own, own, 0.0) * weight
        previous = tl.load(p_blocks - 1, m_before, other=0.0)
        previous = tl.where(previous == previous, previous, 0.0) * weight
        if IS_MAX:
            value = tl.maximum(value, own)
            before = tl.maximum(before, previous)
        else:
            value += own
            before += previous
    value = tl.maximum(value, successor * before)
    value = tl.where(value > 0.0, value, 0.0)
    far = m_candidate & (tl.load(p_set + i_block, m_candidate, other=0).to(tl.int32) > is_new)
    is_scored = i_block < num_blocks
    worth = tl.where(is_scored, value * (1.0 + hysteresis * far.to(tl.float32)), float("inf"))
    is_worth = m_candidate & ((is_scored == 0) | (value >= threshold))
    return worth.to(tl.int32, bitcast=True), is_worth, far


@triton.jit
def best(bits, mask, count):
    """The `count` largest bit patterns within the mask; of equal ones the newest."""
    low = count * 0
    high = count * 0 + BEHIND_INF
    for _ in range(31):
        middle = low + (high - low) // 2
        is_enough = tl.sum((mask & (bits >= middle)).to(tl.int32), axis=0) >= count
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
    above = mask & (bits > low)
    equal = mask & (bits == low)
    left = count - tl.sum(above.to(tl.int32), axis=0)
    newer_or_same = tl.sum(equal.to(tl.int32), axis=0) - tl.cumsum(equal.to(tl.int32), axis=0) + 1
    return above | (equal & (newer_or_same <= left))


@triton.jit
def changes(p_row, num_far, num_new, num_chosen, num_listed):
    """How many come and go."""
    is_long = tl.load(p_row + LONG_START) >= 0
    room = tl.minimum(tl.maximum(num_chosen + num_listed - num_far, 0), num_listed)
    room = tl.minimum(tl.where(is_long, num_new, room), tl.load(p_row + CAP))
    num_coming = tl.minimum(num_new, room)
    num_going = tl.maximum(num_far + num_coming - num_chosen, 0)
    num_going = tl.where(is_long, num_going, tl.minimum(num_going, num_listed))
    return num_coming, num_going


@triton.jit
def store_header(p_row, p_list, num_coming, num_going, num_worth):
    """Place, epoch, step and numbers of a row of the short list."""
    tl.store(p_list, tl.load(p_row + PLACE))
    tl.store(p_list + 1, tl.load(p_row + EPOCH))
    tl.store(p_list + 2, tl.load(p_row + STEP))
    tl.store(p_list + 3, num_coming)
    tl.store(p_list + 4, num_going)
    tl.store(p_list + 5, num_worth)


@triton.jit
def lists_of(p_row, p_list, p_long, i_group, num_coming, num_listed):
    """Where the positions that come and go are listed."""
    long_start = tl.load(p_row + LONG_START)
    span = tl.load(p_row + FIRST_RECENT) - tl.load(p_row + SINK_END)
    p_own = p_long + tl.maximum(long_start, 0) + i_group * span
    is_long = long_start >= 0
    p_come = tl.where(is_long, p_own, p_list + HEADER)
    p_go = tl.where(is_long, p_own + num_coming, p_list + HEADER + num_listed)
    return p_come, p_go


@triton.jit
def choose_sets_kernel(
    p_memory, p_set, p_rows, p_weights, p_lists, p_long,
    stride_channel, stride_group, stride_place, stride_set_group, stride_set_place,
    width, num_listed, successor, hysteresis, threshold,
    C: tl.constexpr, IS_MAX: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Choose for one row and group, in one tile."""
    i_row, i_group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p_row = p_rows + i_row * FIELDS
    place = tl.load(p_row + PLACE).to(tl.int64)
    p_list = p_lists + (i_row * tl.num_programs(1) + i_group) * (HEADER + 2 * num_listed)
    if place < 0:
        tl.store(p_list, -1)
    else:
        i_block = tl.arange(0, TILE)
        sink_end, first_recent = tl.load(p_row + SINK_END), tl.load(p_row + FIRST_RECENT)
        end, is_new = tl.load(p_row + END), tl.load(p_row + IS_NEW)
        p_own_set = p_set + i_group * stride_set_group + place * stride_set_place
        bits, is_worth, far = tile_worth(
            p_memory + i_group * stride_group + place * stride_place, p_weights, p_own_set, i_block,
            tl.load(p_row + NUM_BLOCKS), sink_end, first_recent, is_new,
            stride_channel, successor, hysteresis, threshold, C, IS_MAX,
        )  # fmt: skip
        num_worth = tl.sum(is_worth.to(tl.int32), axis=0)
        num_far = tl.sum(far.to(tl.int32), axis=0)
        num_chosen = tl.minimum(tl.load(p_row + WANT), num_worth)
        new = best(bits, is_worth, num_chosen) & (far == 0)
        num_new = tl.sum(new.to(tl.int32), axis=0)
        num_coming, num_going = changes(p_row, num_far, num_new, num_chosen, num_listed)
        coming = best(bits, new, num_coming)
        going = far & (best(bits, far, num_far - num_going) == 0)
        forced = (i_block < sink_end) | ((i_block >= first_recent) & (i_block < end))
        tl.store(p_own_set + i_block, ((far & (going == 0)) | coming | forced).to(tl.int8), i_block < width)
        store_header(p_row, p_list, num_coming, num_going, num_worth)
        p_come, p_go = lists_of(p_row, p_list, p_long, i_group, num_coming, num_listed)
        tl.store(p_come + tl.cumsum(coming.to(tl.int32), axis=0) - 1, i_block, coming)
        tl.store(p_go + tl.cumsum(going.to(tl.int32), axis=0) - 1, i_block, going)


@triton.jit
def tile_state(p_keys, p_set, i_block, sink_end, first_recent, is_new):
    """As `tile_worth`, from keys made before: a set sign bit says that a block is not worth a slot."""
    m_candidate = (i_block >= sink_end) & (i_block < first_recent)
    key = tl.load(p_keys + i_block, m_candidate, other=0)
    far = m_candidate & (tl.load(p_set + i_block, m_candidate, other=0).to(tl.int32) > is_new)
    return key & INT_MAX, m_candidate & (key >= 0), far


@triton.jit
def cut(
    p_keys, p_set, sink_end, first_recent, is_new, count, WHICH: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Where the `count` best end: their least bit pattern, how many have it, and how many of these there are.

    Of the blocks worth a slot (WHICH 0), of those that are not in the set (1), or of the far ones in the set (2).
    """
    low = count * 0
    high = count * 0 + BEHIND_INF
    for _ in range(16):
        step = (high - low + 3) // 4
        some = tl.zeros((TILE,), tl.int32)
        fewer = tl.zeros((TILE,), tl.int32)
        fewest = tl.zeros((TILE,), tl.int32)
        for start in range(0, first_recent, TILE):
            bits, is_worth, far = tile_state(
                p_keys, p_set, start + tl.arange(0, TILE), sink_end, first_recent, is_new
            )  # fmt: skip
            mask = far if WHICH == 2 else (is_worth & (far == 0) if WHICH == 1 else is_worth)
            some += (mask & (bits >= low + step)).to(tl.int32)
            fewer += (mask & (bits - step >= low + step)).to(tl.int32)
            fewest += (mask & (bits - 2 * step >= low + step)).to(tl.int32)
        # Quarters that hold the count; a bound above `high` never does.
        quarters = (tl.sum(some, axis=0) >= count).to(tl.int32) + (tl.sum(fewer, axis=0) >= count).to(tl.int32)
        quarters += (tl.sum(fewest, axis=0) >= count).to(tl.int32)
        low += quarters * step
        high = tl.where(quarters == 3, high, tl.minimum(high, low + step))
    above = tl.zeros((TILE,), tl.int32)
    equal = tl.zeros((TILE,), tl.int32)
    for start in range(0, first_recent, TILE):
        bits, is_worth, far = tile_state(
            p_keys, p_set, start + tl.arange(0, TILE), sink_end, first_recent, is_new
        )  # fmt: skip
        mask = far if WHICH == 2 else (is_worth & (far == 0) if WHICH == 1 else is_worth)
        above += (mask & (bits > low)).to(tl.int32)
        equal += (mask & (bits == low)).to(tl.int32)
    return low, count - tl.sum(above, axis=0), tl.sum(equal, axis=0)


@triton.jit
def best_of_tile(bits, mask, low, left, num_equal, num_before):
    """Which blocks of a tile are among the best, and how many blocks with the least bit pattern there were so far."""
    equal = mask & (bits == low)
    newer_or_same = num_equal - num_before - tl.cumsum(equal.to(tl.int32), axis=0) + 1
    is_best = (mask & (bits > low)) | (equal & (newer_or_same <= left))
    return is_best, num_before + tl.sum(equal.to(tl.int32), axis=0)


@triton.jit
def choose_wide_kernel(
    p_memory, p_set, p_rows, p_weights, p_lists, p_long, p_keys,
    stride_channel, stride_group, stride_place, stride_set_group, stride_set_place,
    width, num_listed, successor, hysteresis, threshold,
    C: tl.constexpr, IS_MAX: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Choose for one row and group, tile by tile, with keys int32 [n, G, W] in between."""
    i_row, i_group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p_row = p_rows + i_row * FIELDS
    place = tl.load(p_row + PLACE).to(tl.int64)
    i_line = i_row * tl.num_programs(1) + i_group
    p_list = p_lists + i_line * (HEADER + 2 * num_listed)
    if place < 0:
        tl.store(p_list, -1)
    else:
        sink_end, first_recent = tl.load(p_row + SINK_END), tl.load(p_row + FIRST_RECENT)
        end, is_new = tl.load(p_row + END), tl.load(p_row + IS_NEW)
        p_own_set = p_set + i_group * stride_set_group + place * stride_set_place
        p_own_keys = p_keys + i_line * width
        worths = tl.zeros((TILE,), tl.int32)
        fars = tl.zeros((TILE,), tl.int32)
        for start in range(0, first_recent, TILE):
            i_block = start + tl.arange(0, TILE)
            bits, is_worth, far = tile_worth(
                p_memory + i_group * stride_group + place * stride_place, p_weights, p_own_set, i_block,
                tl.load(p_row + NUM_BLOCKS), sink_end, first_recent, is_new,
                stride_channel, successor, hysteresis, threshold, C, IS_MAX,
            )  # fmt: skip
            tl.store(p_own_keys + i_block, tl.where(is_worth, bits, bits | SIGN), i_block < first_recent)
            worths += is_worth.to(tl.int32)
            fars += far.to(tl.int32)
        # Other threads of this program read the keys
        tl.debug_barrier()
        num_worth, num_far = tl.sum(worths, axis=0), tl.sum(fars, axis=0)
        num_chosen = tl.minimum(tl.load(p_row + WANT), num_worth)
        low, left, num_equal = cut(p_own_keys, p_own_set, sink_end, first_recent, is_new, num_chosen, 0, TILE)
        news = tl.zeros((TILE,), tl.int32)
        num_before = num_far * 0
        for start in range(0, first_recent, TILE):
            bits, is_worth, far = tile_state(
                p_own_keys, p_own_set, start + tl.arange(0, TILE), sink_end, first_recent, is_new
            )  # fmt: skip
            chosen, num_before = best_of_tile(bits, is_worth, low, left, num_equal, num_before)
            news += (chosen & (far == 0)).to(tl.int32)
        num_coming, num_going = changes(
            p_row, num_far, tl.sum(news, axis=0), num_chosen, num_listed
        )  # fmt: skip
        # The best of the chosen ones that are new are the best of all new ones.
        low, left, num_equal = cut(p_own_keys, p_own_set, sink_end, first_recent, is_new, num_coming, 1, TILE)
        low_far, left_far, num_equal_far = cut(
            p_own_keys, p_own_set, sink_end, first_recent, is_new, num_far - num_going, 2, TILE
        )  # fmt: skip
        store_header(p_row, p_list, num_coming, num_going, num_worth)
        p_come, p_go = lists_of(p_row, p_list, p_long, i_group, num_coming, num_listed)
        num_before, num_before_far = num_far * 0, num_far * 0
        for start in range(0, width, TILE):
            i_block = start + tl.arange(0, TILE)
            bits, is_worth, far = tile_state(p_own_keys, p_own_set, i_block, sink_end, first_recent, is_new)
            coming, num_before = best_of_tile(bits, is_worth & (far == 0), low, left, num_equal, num_before)
            kept, num_before_far = best_of_tile(bits, far, low_far, left_far, num_equal_far, num_before_far)
            going = far & (kept == 0)
            forced = (i_block < sink_end) | ((i_block >= first_recent) & (i_block < end))
            tl.store(p_own_set + i_block, (kept | coming | forced).to(tl.int8), i_block < width)
            tl.store(p_come + tl.cumsum(coming.to(tl.int32), axis=0) - 1, i_block, coming)
            tl.store(p_go + tl.cumsum(going.to(tl.int32), axis=0) - 1, i_block, going)
            p_come += tl.sum(coming.to(tl.int32), axis=0)
            p_go += tl.sum(going.to(tl.int32), axis=0)


def choose_sets_triton(
    memory: torch.Tensor,
    in_set: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    policy: ChoicePolicy,
    short_list: torch.Tensor,
    long_list: torch.Tensor,
    single_tile: int = SINGLE_TILE,
    wide_tile: int = WIDE_TILE,
) -> None:
    """See `op.choose_sets`; if requests may have more blocks than `single_tile`, they are walked in tiles."""
    num_channels, num_groups, _, width = memory.shape
    if len(rows) == 0 or num_groups == 0:
        return
    tensors = memory, in_set, rows, weights, short_list, long_list
    sizes = (
        *memory.stride()[:3], *in_set.stride()[:2], width, (short_list.shape[2] - LIST_HEADER) // 2,
        policy.successor, policy.hysteresis, policy.threshold,
    )  # fmt: skip
    constants = {"C": num_channels, "IS_MAX": policy.combine == "max"}
    grid = (len(rows), num_groups)
    if width <= single_tile:
        tile = triton.next_power_of_2(width)
        num_warps = min(MAX_WARPS, max(1, tile // ELEMS_PER_WARP))
        choose_sets_kernel[grid](*tensors, *sizes, **constants, TILE=tile, num_warps=num_warps)
    else:
        keys = torch.empty(len(rows), num_groups, width, dtype=torch.int32, device=memory.device)
        choose_wide_kernel[grid](*tensors, keys, *sizes, **constants, TILE=wide_tile, num_warps=MAX_WARPS)
