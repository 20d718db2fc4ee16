"""summarise_keys: mean formed in float32, bounds exact in low precision, strided pages, other rows untouched."""

import pytest
import torch
from flashmemory_kernels.summarise_keys import Kind, summarise_keys
from flashmemory_kernels.summarise_keys.cases import CASES, KINDS, SummaryCase, make_fp8_inputs, make_inputs

# The mean is formed in float32 (absolute error of a few eps of its largest term, about 4) and rounded once to
# the key dtype: relative 2^-9 in bf16.
ATOL_FP32_SUM = 1e-6
RTOL = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def summarised(case: SummaryCase, kind: Kind, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys [n, Hkv, T, D] of the blocks and their rows [n, Hkv, R, E]."""
    keys, slots, index, block_ids = make_inputs(case, kind, dtype)
    summarise_keys(keys, slots, index, block_ids, kind)
    return keys[slots], index[block_ids]


@pytest.mark.parametrize("dtype", list(RTOL))
@pytest.mark.parametrize("case", CASES)
def test_mean(case: SummaryCase, dtype: torch.dtype) -> None:
    keys, rows = summarised(case, "mean", dtype)
    expected = keys.double().sum(2, keepdim=True) / case.block_size
    torch.testing.assert_close(rows.double(), expected, rtol=RTOL[dtype], atol=ATOL_FP32_SUM)


@pytest.mark.parametrize("dtype", list(RTOL))
@pytest.mark.parametrize("case", CASES)
def test_bounds_are_attained_and_hold(case: SummaryCase, dtype: torch.dtype) -> None:
    keys, rows = summarised(case, "bounds", dtype)
    low, high = rows.chunk(2, dim=-1)
    assert bool(((keys >= low) & (keys <= high)).all())
    assert bool((keys == low).any(2).all())
    assert bool((keys == high).any(2).all())


@pytest.mark.parametrize("dtype", list(RTOL))
@pytest.mark.parametrize("case", CASES)
def test_exact_is_a_copy(case: SummaryCase, dtype: torch.dtype) -> None:
    keys, rows = summarised(case, "exact", dtype)
    assert torch.equal(rows, keys)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_rows_of_other_blocks_stay(case: SummaryCase, kind: Kind) -> None:
    keys, slots, index, block_ids = make_inputs(case, kind)
    summarise_keys(keys, slots, index, block_ids, kind)
    others = torch.ones(case.num_slots, dtype=torch.bool)
    others[block_ids] = False
    assert bool(index[block_ids].isfinite().all())
    assert bool(index[others].isnan().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_gathered_keys_give_the_same_rows(case: SummaryCase, kind: Kind) -> None:
    keys, rows = summarised(case, kind, torch.bfloat16)
    gathered = torch.empty_like(rows)
    summarise_keys(keys, None, gathered, torch.arange(case.num_blocks), kind)
    assert torch.equal(gathered, rows)


def test_wrong_arguments_are_named() -> None:
    keys, slots, index, block_ids = make_inputs(CASES[1], "mean")
    with pytest.raises(ValueError, match="keys: expected at least one token"):
        summarise_keys(keys[:, :, :0], slots, index, block_ids, "mean")
    with pytest.raises(
        ValueError, match=r"kind: expected one of \['bounds', 'mean', 'exact', 'exact_fp8'\], got 'sum'"
    ):
        summarise_keys(keys, slots, index, block_ids, "sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"index: expected shape \[\*, 2, 1, 40\], got \[5, 2, 1, 20\]"):
        summarise_keys(keys, slots, index, block_ids, "bounds")
    with pytest.raises(ValueError, match=r"keys: expected shape \[3, \*, \*, \*\], got \[5, 2, 20, 20\]"):
        summarise_keys(keys, None, index, block_ids, "mean")
    with pytest.raises(ValueError, match=r"slots: expected dtype torch.int64, got torch.int32"):
        summarise_keys(keys, slots.int(), index, block_ids, "mean")
    keys, slots, index, block_ids = make_inputs(CASES[1], "exact")
    with pytest.raises(ValueError, match=r"index: expected contiguous rows"):
        summarise_keys(keys, slots, index.mT, block_ids, "exact")


@pytest.mark.parametrize("dtype", list(RTOL))
@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_stand_for_the_keys(case: SummaryCase, dtype: torch.dtype) -> None:
    keys, slots, index, block_ids, scales = make_fp8_inputs(case, dtype)
    summarise_keys(keys, slots, index, block_ids, "exact_fp8", scales)
    expected, of_blocks = keys[slots].float(), scales[block_ids][..., None, None]
    got = index.view(torch.uint8)[block_ids].view(torch.float8_e4m3fn).float() * of_blocks
    # Half of the distance between codes: 2^-4 of a value, or of the smallest normal one, 2^-6 scales.
    error = (got - expected).abs()
    assert bool((error <= torch.maximum(expected.abs() * 2**-4, of_blocks * 2**-10) * 1.0001).all())
    peaks = expected.abs().amax((2, 3), keepdim=True)
    torch.testing.assert_close(got.abs().amax((2, 3), keepdim=True), peaks, rtol=1e-5, atol=0)
    others = torch.ones(case.num_slots, dtype=torch.bool)
    others[block_ids] = False
    assert bool(scales[others].isnan().all())


def test_a_key_that_is_no_number_leaves_its_block_without_a_scale() -> None:
    keys, slots, index, block_ids, scales = make_fp8_inputs(CASES[1], torch.float32)
    keys[slots[2], 1, 3, 5] = torch.nan
    summarise_keys(keys, slots, index, block_ids, "exact_fp8", scales)
    assert scales[block_ids].isnan().nonzero().tolist() == [[2, 1]]


def test_scales_belong_to_fp8() -> None:
    keys, slots, index, block_ids, scales = make_fp8_inputs(CASES[1])
    with pytest.raises(ValueError, match="scales: expected with the kind 'exact_fp8' and with no other"):
        summarise_keys(keys, slots, index, block_ids, "exact_fp8")
    with pytest.raises(ValueError, match="scales: expected with the kind 'exact_fp8' and with no other"):
        summarise_keys(keys, slots, index.to(keys.dtype), block_ids, "exact", scales)
    with pytest.raises(ValueError, match=r"index: expected dtype torch.float8_e4m3fn, got torch.bfloat16"):
        summarise_keys(keys, slots, index.to(keys.dtype), block_ids, "exact_fp8", scales)
