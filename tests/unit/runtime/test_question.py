"""The queries of a prompt's newest tokens are kept by position, whatever the steps that compute them."""

from itertools import pairwise

import pytest
import torch

from flashmemory_vllm.residency.asked import AskedRow
from flashmemory_vllm.residency.batch import Batch
from flashmemory_vllm.residency.types import Phase, Row
from flashmemory_vllm.runtime.question import QuestionQueries
from flashmemory_vllm.runtime.shape import AttentionShape

SHAPE = AttentionShape(("layer",), 3, 1, 8, 1.0, 16, torch.float32, torch.device("cpu"))
WINDOW = 16
NUM_ANCHORS = 2


class Prompts:
    """Requests with a query for each token, computed step by step."""

    def __init__(self, window: int = WINDOW, **prompt_lens: int) -> None:
        self.kept = QuestionQueries(window, NUM_ANCHORS, SHAPE)
        self.prompt_lens = prompt_lens
        torch.manual_seed(0)
        self.queries = {name: torch.randn(size + 50, NUM_ANCHORS, 3, 8) for name, size in prompt_lens.items()}

    def step(self, phase: Phase = Phase.PREFILL, **tokens: tuple[int, int]) -> None:
        """Compute tokens from and up to a position of each request, in one batch."""
        rows = [Row(name, phase, start, end - start, (), (), (), ()) for name, (start, end) in tokens.items()]
        self.kept.set_rows(Batch.of(rows, range(len(rows))), self.prompt_lens.__getitem__)
        batch = torch.cat([self.queries[name][start:end] for name, (start, end) in tokens.items()])
        # In two runs: one row, and those behind it
        first = rows[0].num_tokens
        for anchor in range(NUM_ANCHORS):
            self.kept.capture(anchor, batch[first:, anchor], first)
            self.kept.capture(anchor, batch[:first, anchor])

    def earlier(self, name: str, end: int) -> torch.Tensor | None:
        """What a selection is given beside the token before `end`, which is the last one computed."""
        return self.kept.earlier(AskedRow(name, 0, 0, end, self.prompt_lens[name], 1, 0, 0, 1, 1, 1))

    def expected(self, name: str, window: int = WINDOW, newest: int = 1) -> torch.Tensor:
        """The question, but for its newest tokens."""
        end = self.prompt_lens[name]
        return self.queries[name][max(0, end - window) : end - newest]


@pytest.mark.parametrize("last", [1, 2, 15, 16, 17, 40])
def test_the_question_is_the_same_in_any_chunks(last: int) -> None:
    prompts = Prompts(a=100)
    for start, end in ((0, 50), (50, 100 - last), (100 - last, 100)):
        if start < end:
            prompts.step(a=(start, end))
    found = prompts.earlier("a", 100)
    assert found is not None
    assert torch.equal(found, prompts.expected("a"))


def test_one_token_a_step_and_beside_others() -> None:
    prompts = Prompts(a=40, b=33, c=7)
    prompts.step(c=(0, 7), a=(0, 20))
    for token in range(20, 40):
        # Twenty steps of one-token rows, a decode row among them in each
        prompts.step(b=(token - 20, token - 19), a=(token, token + 1))
    prompts.step(b=(20, 33))
    for name, end in (("a", 40), ("b", 33), ("c", 7)):
        found = prompts.earlier(name, end)
        assert found is not None
        assert torch.equal(found, prompts.expected(name)), name


def test_a_decode_row_takes_no_room_and_shifts_the_others() -> None:
    prompts = Prompts(a=30, b=20)
    prompts.step(Phase.DECODE, a=(35, 36))
    assert len(prompts.kept) == 0
    mixed = [Row("a", Phase.DECODE, 35, 1, (), (), (), ()), Row("b", Phase.PREFILL, 0, 20, (), (), (), ())]
    prompts.kept.set_rows(Batch.of(mixed, [0, 1]), prompts.prompt_lens.__getitem__)
    batch = torch.cat((prompts.queries["a"][35:36], prompts.queries["b"][:20]))
    for anchor in range(NUM_ANCHORS):
        prompts.kept.capture(anchor, batch[:, anchor])
    found = prompts.earlier("b", 20)
    assert found is not None
    assert torch.equal(found, prompts.expected("b"))


def test_a_preempted_request_comes_back_with_its_question() -> None:
    prompts = Prompts(a=60)
    for end in (50, 60):
        prompts.step(a=(end - 10, end))
    prompts.step(a=(32, 90))  # and ten outputs and more, computed densely again
    for start, end in pairwise((64, 70, 90)):
        prompts.step(a=(start, end))
    found = prompts.earlier("a", 90)
    assert found is not None
    # All of it: the last token computed is none of the prompt
    assert torch.equal(found, prompts.expected("a", newest=0))


def test_a_question_cut_short_by_a_preemption_is_computed_again() -> None:
    prompts = Prompts(a=60)
    prompts.step(a=(0, 52))
    prompts.step(a=(32, 60))
    found = prompts.earlier("a", 60)
    assert found is not None
    assert torch.equal(found, prompts.expected("a"))


def test_tokens_that_were_never_computed_are_left_out() -> None:
    prompts = Prompts(a=60)
    prompts.step(a=(0, 48))
    prompts.step(a=(52, 60))  # a prefix hit as no scheduler of ours gives it
    found = prompts.earlier("a", 60)
    assert found is not None
    assert torch.equal(found, prompts.expected("a", window=8))


def test_a_prompt_of_one_token_has_no_other() -> None:
    prompts = Prompts(a=60, b=1)
    prompts.step(a=(0, 60), b=(0, 1))
    assert prompts.earlier("b", 1) is None
    assert prompts.earlier("b", 2) is not None


def test_what_was_given_out_is_not_overwritten() -> None:
    prompts = Prompts(a=60)
    prompts.step(a=(0, 60))
    found = prompts.earlier("a", 60)
    prompts.queries["a"] = torch.zeros_like(prompts.queries["a"])
    prompts.step(a=(0, 60))
    assert found is not None
    assert bool(found.any())


def test_nothing_is_left_of_requests_that_ended() -> None:
    prompts = Prompts(**{f"r{index}": 20 for index in range(100)})
    for index in range(100):
        prompts.step(Phase.PREFILL, **{f"r{index}": (0, 20)})
        prompts.kept.forget([f"r{index}", "never heard of"])
    assert len(prompts.kept) == 0
    prompts.step(r0=(0, 20))
    prompts.kept.reset()
    assert len(prompts.kept) == 0


def test_nothing_is_kept_where_nobody_asks() -> None:
    prompts = Prompts(window=0, a=20)
    prompts.step(a=(0, 20))
    assert len(prompts.kept) == 0
    assert prompts.earlier("a", 20) is None
