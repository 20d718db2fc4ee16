"""remember_shares: against a plain loop, numbers that are none, and steps one after the other."""

import math
from typing import Any

import pytest
import torch
from flashmemory_kernels.common.due_rows import Due, make_rows
from flashmemory_kernels.remember_shares import Channel, Channels, remember_shares
from flashmemory_kernels.remember_shares.cases import CASES, RememberCase, RememberInputs, make_inputs

# Sums of at most 12 heads and 5 queries, powers and roots in float32.
TOL: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def by_heads(shares: list[float], heads: str) -> float:
    if heads == "max":
        return max(shares)
    if heads == "mean":
        return sum(shares) / len(shares)
    return math.sqrt(sum(share * share for share in shares) / len(shares))


def remembered(given: RememberInputs, channel: Channel, row: list[int], line: int, block: int, group: int) -> float:
    """What one block of a row is remembered for in one channel and group."""
    place, num_layers = row[Due.PLACE], len(given.groups)
    num_heads, tile = given.mass.shape[1] // num_layers, given.mass.shape[3]
    index = given.channels.decays.tolist().index(pytest.approx(channel.decay))
    is_known = block < row[Due.NUM_KNOWN]
    fade = channel.decay ** row[Due.ELAPSED]
    old = float(given.memory[index, group, place, block]) if is_known else 0.0
    result = {"max": old * fade, "sum": old * fade, "rms": old * old * fade}[channel.over_time]
    for age in range(row[Due.NUM_QUERIES]):
        shares = []
        for layer, of_group in enumerate(given.groups.tolist()):
            for head in range(num_heads) if of_group == group else ():
                member = layer * num_heads + head
                mass = given.mass[row[Due.FIRST_TILE] + block // tile, member, age, block % tile].double()
                share = float((mass - given.lse[line, member, age].double()).exp())
                shares.append(0.0 if math.isnan(share) else share)
        value, weight = by_heads(shares, channel.heads), channel.decay**age
        if channel.over_time == "max":
            result = max(result, value * weight)
        elif channel.over_time == "sum":
            result += value * weight
        else:
            result += (1 - channel.decay) * value * value * weight
    return math.sqrt(result) if channel.over_time == "rms" else result


@pytest.mark.parametrize("case", CASES)
def test_one_block_at_a_time(case: RememberCase) -> None:
    given = make_inputs(case)
    expected = given.memory.clone()
    for line, row in enumerate(given.rows.tolist()):
        for block in range(row[Due.NUM_BLOCKS] if row[Due.NUM_QUERIES] else 0):
            for index, channel in enumerate(case.channels):
                for group in range(expected.shape[1]):
                    value = remembered(given, channel, row, line, block, group)
                    expected[index, group, row[Due.PLACE], block] = value
    remember_shares(*given)
    torch.testing.assert_close(given.memory, expected, **TOL, equal_nan=True)


def test_a_memory_of_many_steps_is_that_of_one_with_all_their_queries() -> None:
    """As long as no step sees more queries than are kept, it does not matter when it comes."""
    generator = torch.Generator().manual_seed(0)
    num_blocks, num_steps, channels = 5, 6, (Channel(0.9), Channel(0.8, "mean", "sum"), Channel(0.7, "rms", "rms"))
    mass = torch.randn(1, 2, num_steps, 8, generator=generator)  # the newest query first
    lse = mass[:, :, :, :num_blocks].logsumexp(3)
    memories = []
    for portions in ((num_steps,), (1, 3, 2), (2, 1, 1, 1, 1)):
        memory, first = torch.full((3, 1, 2, num_blocks), torch.nan), num_steps
        for portion in portions:
            fields = {Due.PLACE: 1, Due.NUM_BLOCKS: num_blocks, Due.NUM_QUERIES: portion, Due.ELAPSED: portion}
            rows = make_rows([{**fields, Due.NUM_KNOWN: 0 if first == num_steps else num_blocks}], 1, tile=8)
            part = slice(first - portion, first)
            of_step = mass[:, :, part].contiguous(), lse[:, :, part].contiguous()
            groups = torch.zeros(1, dtype=torch.int32)
            remember_shares(*of_step, rows, groups, Channels.of(channels, "cpu"), memory)
            first -= portion
        assert bool(memory[:, :, 0].isnan().all())
        memories.append(memory[:, 0, 1])
    torch.testing.assert_close(memories[0], memories[1], **TOL)
    torch.testing.assert_close(memories[0], memories[2], **TOL)


def test_a_query_that_is_no_number_is_forgotten() -> None:
    given = make_inputs(CASES[1])
    given.mass.fill_(torch.nan)
    before, row = given.memory.clone(), given.rows[1].tolist()
    remember_shares(*given)
    known, place = row[Due.NUM_KNOWN], row[Due.PLACE]
    fade = torch.tensor([0.9, 0.98, 1.0]).pow(row[Due.ELAPSED]).view(3, 1, 1)
    torch.testing.assert_close(given.memory[:, :, place, :known], before[:, :, place, :known] * fade, **TOL)
    assert not given.memory[:, :, place, known : row[Due.NUM_BLOCKS]].any()


def test_wrong_arguments_are_named() -> None:
    mass, lse, rows, groups, channels, memory = make_inputs(CASES[1])
    with pytest.raises(ValueError, match=r"lse: expected shape \[8, 18, 4\], got \[7, 18, 4\]"):
        remember_shares(mass, lse[:7], rows, groups, channels, memory)
    with pytest.raises(ValueError, match=r"groups: expected a number of layers that divides 18 heads, got 4"):
        remember_shares(mass, lse, rows, groups.new_zeros(4), channels, memory)
    with pytest.raises(ValueError, match=r"mass: expected tiles of a power of two, got 7"):
        remember_shares(mass[..., :7].contiguous(), lse, rows, groups, channels, memory)
    with pytest.raises(ValueError, match=r"memory: expected shape \[3, \*, \*, \*\], got \[2, 2, 7, 18\]"):
        remember_shares(mass, lse, rows, groups, channels, memory[:2])
    with pytest.raises(ValueError, match="channels: expected at least one channel, got none"):
        Channels.of((), "cpu")
    with pytest.raises(ValueError, match=r"channels: expected decays in 0..1, got 1.5"):
        Channels.of((Channel(1.5),), "cpu")
