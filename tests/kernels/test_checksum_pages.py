"""checksum_pages: every way in which a page can come back wrong has another sum; only the blocks meant are touched."""

from collections.abc import Callable

import pytest
import torch
from flashmemory_kernels.checksum_pages import PageSet, store_checksums, verify_checksums
from flashmemory_kernels.checksum_pages.cases import CASES, ChecksumCase, make_inputs
from flashmemory_kernels.checksum_pages.naive import FIRST, PLACE, SECOND, page_sums

DTYPES = [torch.float32, torch.bfloat16]
MASK = (1 << 64) - 1


def sum_in_python(words: list[int]) -> int:
    """The definition with Python's unbounded integers."""
    total = 0
    for place, word in enumerate(words):
        x = (word + place * PLACE) & MASK
        x = ((x ^ (x >> 30)) * FIRST) & MASK
        x = ((x ^ (x >> 27)) * SECOND) & MASK
        total += x ^ (x >> 31)
    return total & MASK


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_sums_follow_the_definition_and_no_other_block_is_touched(case: ChecksumCase, dtype: torch.dtype) -> None:
    given = make_inputs(case, dtype)
    store_checksums(PageSet(given.pages), given.page_ids, given.sums, given.block_ids)
    for layer, pages in enumerate(given.pages):
        words = pages[given.page_ids].contiguous().view(torch.int32)
        for page, block in zip(words.tolist(), given.block_ids.tolist(), strict=True):
            assert int(given.sums[layer, block]) & MASK == sum_in_python(page)
    untouched = torch.ones(case.num_pool_pages, dtype=torch.bool)
    untouched[given.block_ids] = False
    assert bool((given.sums[:, untouched] == -1).all())


def _swap(page: torch.Tensor) -> None:
    page[[3, 900]] = page[[900, 3]]


def _flip_in_two(page: torch.Tensor) -> None:
    page[8:10] ^= 1 << 12


DAMAGE: dict[str, Callable[[torch.Tensor], object]] = {
    "one bit": lambda page: page[17].bitwise_xor_(1),
    "the sign bit of the last word": lambda page: page[-1].bitwise_xor_(-(1 << 31)),
    "two words swapped": _swap,
    "the same bit in two words": _flip_in_two,
    "halves swapped": lambda page: page.copy_(page.roll(len(page) // 2)),
    "moved by one word": lambda page: page.copy_(page.roll(1)),
    "all zero": lambda page: page.zero_(),
    "all ones": lambda page: page.fill_(-1),
    "a piece of zeros": lambda page: page[512:1024].zero_(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen_in_that_page_alone(damage: str) -> None:
    given = make_inputs(CASES[2])
    pages = PageSet(given.pages)
    store_checksums(pages, given.page_ids, given.sums, given.block_ids)
    wrong = torch.empty(2, len(given.page_ids), dtype=torch.uint8)
    verify_checksums(pages, given.page_ids, given.sums, given.block_ids, wrong)
    assert not wrong.any()
    expected = [words.clone() for words in pages.words]
    expected[1][given.page_ids[4]] = 0
    DAMAGE[damage](pages.words[1][given.page_ids[4]])
    verify_checksums(pages, given.page_ids, given.sums, given.block_ids, wrong)
    assert wrong.nonzero().tolist() == [[1, 4]]
    assert all(map(torch.equal, pages.words, expected)), "that page is zeros now, and no other has changed"


def test_words_that_differ_in_the_sign_only_may_not_be_swapped() -> None:
    """What a sum with odd factors would miss: the product of two even differences."""
    page = torch.zeros(1, 64, dtype=torch.int32)
    page[0, 5] = -(1 << 31)
    swapped = page[:, torch.tensor([*range(5), 6, 5, *range(7, 64)])]
    assert bool((page_sums(page) != page_sums(swapped)).all())


def test_a_page_of_another_block_and_an_older_one_are_seen() -> None:
    given = make_inputs(CASES[1], torch.float32)
    pages, ids = PageSet(given.pages), given.page_ids
    store_checksums(pages, ids, given.sums, given.block_ids)
    wrong = torch.empty(3, len(ids), dtype=torch.uint8)
    verify_checksums(pages, ids.roll(1), given.sums, given.block_ids, wrong)
    assert bool((wrong == 1).all())
    older = [layer.clone() for layer in given.pages]
    for layer in given.pages:
        layer.add_(1)
    store_checksums(pages, ids, given.sums, given.block_ids)
    for layer, before in zip(given.pages, older, strict=True):
        layer[ids[2]] = before[ids[2]]
    verify_checksums(pages, ids, given.sums, given.block_ids, wrong)
    assert set(wrong.nonzero()[:, 1].tolist()) == {2}


def test_no_pages_are_fine() -> None:
    given, nothing = make_inputs(CASES[1]), torch.empty(0, dtype=torch.int64)
    pages = PageSet(given.pages)
    store_checksums(pages, nothing, given.sums, nothing)
    verify_checksums(pages, nothing, given.sums, nothing, torch.empty(3, 0, dtype=torch.uint8))
    assert bool((given.sums == -1).all())


def test_wrong_arguments_are_named() -> None:
    given = make_inputs(CASES[1])
    pages = PageSet(given.pages)
    with pytest.raises(ValueError, match=r"pages: expected the pages of at least one layer"):
        PageSet([])
    with pytest.raises(ValueError, match=r"pages\[1\]: expected shape \[9, 30\], got \[9, 28\]"):
        PageSet([given.pages[0], given.pages[1][:, :28]])
    with pytest.raises(ValueError, match=r"pages\[0\]: expected a page of whole 4-byte words, got 29 elements of 2"):
        PageSet([given.pages[0][:, :29]])
    with pytest.raises(ValueError, match=r"pages\[1\]: expected rows 98 elements apart, got 30"):
        PageSet([given.pages[0], given.pages[1].contiguous()])
    with pytest.raises(ValueError, match=r"block_ids: expected shape \[5\], got \[4\]"):
        store_checksums(pages, given.page_ids, given.sums, given.block_ids[:4])
    with pytest.raises(ValueError, match=r"sums: expected dtype torch.int64, got torch.int32"):
        store_checksums(pages, given.page_ids, given.sums.int(), given.block_ids)
    with pytest.raises(ValueError, match=r"wrong: expected shape \[3, 5\], got \[3, 4\]"):
        verify_checksums(pages, given.page_ids, given.sums, given.block_ids, torch.zeros(3, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"wrong: expected dtype torch.uint8, got torch.bool"):
        verify_checksums(pages, given.page_ids, given.sums, given.block_ids, torch.zeros(3, 5, dtype=torch.bool))
