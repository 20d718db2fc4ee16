"""A recorder that watches a made-up model, whose every key is known, through chunked prefill and batched decode."""

import pytest

from flashmemory_vllm.capture import recorder
from flashmemory_vllm.capture.passes import BatchRow
from flashmemory_vllm.errors import IntegrityError
from tests.unit.capture.watched_model import Model


def test_two_requests_in_chunks_and_batches() -> None:
    model = Model([40, 40])
    model.step([(0, 19, 0, 10)])
    model.step([(1, 9, 0, 9), (0, 19, 10, 9)])
    for step in range(8):
        rows = [(0, 19, 19 + step, 1), (1, 9, 9 + step, 1)]
        model.step(rows[:: -1 if step % 2 else 1])
    model.check(0, model.recorder.take("0"), iter(range(18, 27)))
    model.check(1, model.recorder.take("1"), iter(range(8, 17)))


def test_a_window_longer_than_the_prompt_is_all_of_it() -> None:
    model = Model([40], window=16)
    for done, new in ((0, 5), (5, 1), (6, 3), (9, 1), (10, 1), (11, 1)):
        model.step([(0, 9, done, new)])
    model.check(0, model.recorder.take("0"), iter(range(8, 12)))


def test_every_third_output_token() -> None:
    model = Model([40], every=3, window=1, layer_mass=False)
    model.step([(0, 11, 0, 11)])
    for step in range(7):
        model.step([(0, 11, 11 + step, 1)])
    recording = model.recorder.take("0")
    assert all(token.layer_mass is None for token in recording.tokens)
    assert [token.position for token in recording.tokens] == [10, 13, 16]
    model.check(0, recording, iter([10, 13, 16]))


@pytest.mark.parametrize("elements", [1 << 27, 700, 1])
def test_text_is_recorded_as_it_is_prefilled(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 13 tokens and the text behind it, in chunks, beside a row that decodes; in passes of any size."""
    monkeypatch.setattr(recorder, "PASS_ELEMENTS", elements)
    model = Model([40, 40])
    model.step([(1, 9, 0, 9)])
    model.step([(1, 9, 9, 1), (0, 13, 0, 11)])
    model.step([(1, 9, 10, 1), (0, 13, 11, 8)])
    model.step([(0, 13, 19, 12)])
    model.check(0, model.recorder.take("0"), iter(range(12, 31)))
    model.check(1, model.recorder.take("1"), iter(range(8, 11)))


def test_every_third_token_of_a_text() -> None:
    model = Model([40], every=3)
    for done, new in ((0, 15), (15, 2), (17, 11)):
        model.step([(0, 11, done, new)])
    model.check(0, model.recorder.take("0"), iter(range(10, 28, 3)))


def test_a_request_that_began_unseen_is_refused() -> None:
    with pytest.raises(IntegrityError, match="recording begins with its first token"):
        Model([40]).step([(0, 11, 8, 3)])


def test_a_pass_that_left_layers_out_is_refused() -> None:
    model = Model([40])
    model.recorder.begin([BatchRow("0", 11, 0, 11, model.slots[0])])
    model.pages.zero_()
    model.recorder.layer(0, model.queries[0][0, :11])
    with pytest.raises(IntegrityError, match="1 of 3 layers"):
        model.recorder.end()
