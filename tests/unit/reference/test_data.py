"""Training batches train exactly the answers, and the same step always gives the same batch."""

import numpy as np
import pytest

from flashmemory_vllm.evaluation import vocabulary as words
from flashmemory_vllm.evaluation.tasks import LATE_COUNT, TASK_NAMES
from flashmemory_vllm.reference.data import BatchPlan, Prefetcher, TrainingBatch, build_batch

QUESTION_WORDS = {
    "multikey": words.ASK,
    "multivalue": words.EACH,
    "multiquery": words.LIST,
    "tracking": words.TRACE,
    "late": words.LATER,
}


def _plan(num_tokens: int) -> BatchPlan:
    return BatchPlan(2, num_tokens, tuple((task, 1.0) for task in TASK_NAMES))


def _batches(num_tokens: int) -> list[TrainingBatch]:
    return [build_batch(_plan(num_tokens), seed=0, step=step) for step in range(12)]


@pytest.mark.parametrize("num_tokens", [128, 256, 512, 2048, 16384])
def test_labels_are_the_answers_and_nothing_else(num_tokens: int) -> None:
    for batch in _batches(num_tokens):
        assert batch.tokens.shape == (2, num_tokens)
        np.testing.assert_array_equal(batch.labels, batch.tokens[:, batch.positions + 1])
        for span in batch.spans:
            label = batch.labels[:, span.start : span.stop]
            assert (label[:, -1] == words.END).all()
            assert (label[:, :-1] != words.END).all()
            before = batch.tokens[0, : batch.positions[span.start] + 1].tolist()
            assert QUESTION_WORDS[span.task] in before[-12:]
        assert batch.positions[-1] == num_tokens - 2
        assert (batch.tokens[:, : batch.positions[0]] != words.END).all()


@pytest.mark.parametrize("num_tokens", [512, 4096])
def test_asked_values_stand_in_the_context(num_tokens: int) -> None:
    for batch in _batches(num_tokens):
        context = words.decode(batch.tokens[0, : batch.positions[0]].tolist())
        for span in batch.spans:
            value = batch.labels[0, span.stop - 4 : span.stop - 1].tolist()
            assert words.decode(value) in context


def test_there_are_more_needles_than_questions() -> None:
    for num_tokens in (128, 1024, 8192):
        for batch in _batches(num_tokens):
            num_needles = int((batch.tokens[0] == words.NEEDLE).sum())
            assert num_needles > 2 * sum(span.task == "multikey" for span in batch.spans)


def test_counting_weighs_little() -> None:
    late = [(batch, span) for batch in _batches(4096) for span in batch.spans if span.task == "late"]
    assert late
    for batch, span in late:
        weights = batch.weights[span.start : span.stop]
        assert (weights[:LATE_COUNT] < 0.2).all()
        assert (weights[LATE_COUNT:] == 1).all()


def test_both_raw_and_chat_prompts_come_up() -> None:
    starts = {int(batch.tokens[0, 1] == words.USER) for batch in _batches(256)}
    assert starts == {0, 1}


def test_prefetching_changes_nothing() -> None:
    prefetcher = Prefetcher(seed=3, first_step=5, make_plan=lambda step: _plan(128 << (step % 2)))
    ahead = [batch for _, batch in zip(range(6), prefetcher, strict=False)]
    prefetcher.close()
    for step, batch in enumerate(ahead, start=5):
        expected = build_batch(_plan(128 << (step % 2)), seed=3, step=step)
        np.testing.assert_array_equal(batch.tokens, expected.tokens)
