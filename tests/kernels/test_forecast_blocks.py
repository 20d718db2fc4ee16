"""forecast_blocks: against a plain loop, block by block; nothing else is read or written."""

import math

import pytest
import torch
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.forecast_blocks import NOT_ASKED, forecast_blocks
from flashmemory_kernels.forecast_blocks.cases import CASES, ForecastCase, ForecastInputs, make_inputs


def _expected(given: ForecastInputs, row: list[int], group: int, block: int) -> float:
    """What one block is expected to be worth."""
    memory, num_blocks = given.memory[:, group, row[Due.PLACE]].double(), row[Due.NUM_BLOCKS]
    num_channels = len(memory) - 3
    features = []
    for beside in (block - 1, block, block + 1):
        for channel in range(num_channels):
            share = float(memory[channel, beside]) if 0 <= beside < num_blocks else 0.0
            features.append(math.log(share + 1e-4) / 4 + 1)
    newest, asked = float(memory[-3, block]), float(memory[-2, block])
    tokens = (num_blocks - block) * given.block_size
    features += [newest / 4, (newest if asked <= NOT_ASKED else asked) / 4, math.log(tokens) / 8, 256 / (tokens + 256)]
    features.append(1.0 if row[Due.NUM_KNOWN] == 0 else 0.0)
    head = given.head
    before, own = (
        sum(float(memory[channel, at]) * float(weight) for channel, weight in enumerate(head.mix)) if at >= 0 else 0.0
        for at in (block - 1, block)
    )
    features.append(math.log(max(own, before / 2) + 1e-4) / 4 + 1)
    logit = float(head.bias) + sum(value * float(weight) for value, weight in zip(features, head.linear, strict=True))
    for unit in range(len(head.out)):
        weights = head.hidden[:, unit].tolist()
        value = float(head.hidden_bias[unit]) + sum(x * weight for x, weight in zip(features, weights, strict=True))
        logit += float(head.out[unit]) * value / (1 + math.exp(-value))
    slope, offset = head.calibration.tolist()
    return 1 / (1 + math.exp(-(offset + slope * logit)))


@pytest.mark.parametrize("case", CASES)
def test_one_block_at_a_time(case: ForecastCase) -> None:
    given = make_inputs(case)
    expected = given.memory.clone()
    for row in given.rows.tolist():
        for block in range(row[Due.NUM_BLOCKS] if row[Due.NUM_QUERIES] else 0):
            for group in range(case.num_groups):
                value = _expected(given, row, group, block)
                expected[-1, group, row[Due.PLACE], block] = 0.0 if math.isnan(value) else value
    forecast_blocks(*given)
    torch.testing.assert_close(given.memory, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_wrong_arguments_are_named() -> None:
    memory, rows, head, size = make_inputs(CASES[1])
    with pytest.raises(ValueError, match="memory: expected 3 channels or more, got 2"):
        forecast_blocks(memory[:2], rows, head, size)
    with pytest.raises(ValueError, match=r"hidden: expected shape \[12, 8\], got \[15, 8\]"):
        forecast_blocks(memory[:5], rows, head, size)
    with pytest.raises(ValueError, match="hidden: expected a power of two of units, got 7"):
        forecast_blocks(memory, rows, head._replace(hidden=head.hidden[:, :7].contiguous()), size)
    with pytest.raises(ValueError, match=r"out: expected a contiguous tensor"):
        forecast_blocks(memory, rows, head._replace(out=torch.zeros(16)[::2]), size)
    with pytest.raises(ValueError, match=r"memory: expected a last dim of stride 1"):
        forecast_blocks(memory.mT.contiguous().mT, rows, head, size)
