"""Prompts are the same for every engine, and cached only where that is wanted."""

from hypothesis import given
from hypothesis import strategies as st

from flashmemory_vllm.benchmark.prompts import make_prompts, make_sharing_prompts

LENS = st.lists(st.integers(10, 400), min_size=2, max_size=5)


@given(LENS, st.integers(0, 1 << 20), st.integers(20, 200_000))
def test_prompts_are_repeatable_ids_of_the_vocabulary(lens: list[int], streams: int, vocabulary: int) -> None:
    prompts = make_prompts(lens, vocabulary, streams)
    assert [len(prompt) for prompt in prompts] == lens
    assert prompts == make_prompts(lens, vocabulary, streams)
    assert all(0 <= token < vocabulary for prompt in prompts for token in prompt)


@given(LENS, st.integers(1, 500))
def test_a_longer_prompt_begins_as_the_shorter_one_in_its_place(lens: list[int], more: int) -> None:
    short = make_prompts(lens, 128_256, 0)
    long = make_prompts([length + more for length in lens], 128_256, 0)
    assert [prompt[:length] for prompt, length in zip(long, lens, strict=True)] == short


def test_prompts_of_one_load_or_of_two_families_have_nothing_in_common() -> None:
    prompts = [*make_prompts([64] * 8, 128_256, 1), *make_prompts([64] * 8, 128_256, 2)]
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 16


@given(LENS)
def test_sharing_prompts_share_nine_tenths_and_differ_after_that(lens: list[int]) -> None:
    shared, prompts = make_sharing_prompts(lens, 128_256, 3)
    assert len(shared) == int(0.9 * min(lens))
    assert [len(prompt) for prompt in prompts] == lens
    assert all(prompt[: len(shared)] == shared for prompt in prompts)
    assert prompts[0][len(shared) :] != prompts[1][len(shared) :]
