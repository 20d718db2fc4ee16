"""translate_slots: every layer group's own table, padding, and columns nobody asked for."""

import pytest
import torch
from flashmemory_kernels.translate_slots import translate_slots
from flashmemory_kernels.translate_slots.cases import CASES, POISON, TranslateCase, make_inputs
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("case", CASES)
def test_each_group_reads_its_own_table(case: TranslateCase) -> None:
    logical, lut, out = make_inputs(case)
    mapping = logical.clone()
    translate_slots(mapping, lut, case.block_size, out)
    for group, table in enumerate(lut.tolist()):
        expected = [
            slot if slot < 0 else table[slot // case.block_size] * case.block_size + slot % case.block_size
            for slot in logical.tolist()
        ]
        assert out[group, : case.num_tokens].tolist() == expected
    assert torch.equal(mapping, out[0, : case.num_tokens])
    assert bool((out[:, case.num_tokens :] == POISON).all())


@given(
    block_size=st.integers(1, 64),
    slots=st.lists(st.integers(-40, 639), max_size=30),
)
def test_an_identity_table_changes_nothing(block_size: int, slots: list[int]) -> None:
    lut = torch.arange(640, dtype=torch.int32).expand(2, -1)
    mapping, out = torch.tensor(slots, dtype=torch.int64), torch.empty(2, len(slots), dtype=torch.int64)
    translate_slots(mapping, lut, block_size, out)
    assert mapping.tolist() == slots
    assert out.tolist() == [slots, slots]


def test_a_block_without_a_slot_becomes_padding() -> None:
    mapping, out = torch.arange(16), torch.empty(1, 16, dtype=torch.int64)
    translate_slots(mapping, torch.full((1, 1), -1, dtype=torch.int32), 16, out)
    assert bool((mapping < 0).all())


def test_wrong_arguments_are_named() -> None:
    mapping, lut, out = make_inputs(CASES[1])
    with pytest.raises(ValueError, match=r"out: expected at least 7 columns, got 6"):
        translate_slots(mapping, lut, 16, out[:, :6])
    with pytest.raises(ValueError, match=r"out: expected shape \[3, \*\], got \[2, 9\]"):
        translate_slots(mapping, lut, 16, out[:2])
    with pytest.raises(ValueError, match=r"lut: expected dtype torch.int32, got torch.int64"):
        translate_slots(mapping, lut.long(), 16, out)
    with pytest.raises(ValueError, match=r"slot_mapping: expected a last dim of stride 1"):
        translate_slots(mapping.repeat(2)[::2], lut, 16, out)
