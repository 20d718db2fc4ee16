"""A document's tensors: rows joined as the format says, nothing lost but what it leaves out."""

from dataclasses import replace

import numpy as np
import pytest

from flashmemory_vllm.capture.document import LEAST_MASS, LEAST_SHARE, Document
from flashmemory_vllm.errors import IntegrityError
from tests.unit.capture.documents import BLOCK_SIZE, make_document


def test_rows_come_back_out_of_the_joined_arrays() -> None:
    document = make_document(1, prompt_len=30, num_outputs=7)
    tensors = document.tensors(BLOCK_SIZE)
    for index, token in enumerate(document.recording.tokens):
        assert tensors["positions"][index] == token.position
        share = slice(tensors["share_ptr"][index], tensors["share_ptr"][index + 1])
        # The block that the token itself lies in is no candidate
        expected = [block for block in range(token.position // BLOCK_SIZE) if token.largest[block] >= LEAST_SHARE]
        assert tensors["share_ids"][share].tolist() == expected
        assert tensors["share"][share].tolist() == token.largest[expected].tolist()
        mass = slice(tensors["mass_ptr"][index], tensors["mass_ptr"][index + 1])
        dense = np.zeros(len(token.mass))
        dense[tensors["mass_ids"][mass]] = tensors["mass"][mass]
        np.testing.assert_allclose(dense, token.mass, rtol=1e-3, atol=LEAST_MASS)
        own = tensors["anchor_share"][len(document.recording.prompt_shares) + index]
        assert np.array_equal(own[: len(token.of_anchors)], token.of_anchors)
        assert not own[len(token.of_anchors) :].any()
        assert token.layer_mass is not None
        width = token.layer_mass.shape[2]
        assert np.array_equal(tensors["layer_mass"][:, index, :, :width], token.layer_mass)
        assert not tensors["layer_mass"][:, index, :, width:].any()
    asked = tensors["anchor_share"][: len(document.recording.prompt_shares), :4]
    assert np.array_equal(asked, document.recording.prompt_shares)
    types = {name: str(tensor.dtype) for name, tensor in tensors.items()}
    assert types == {
        "keys": "float16",
        "prompt_queries": "float16",
        "queries": "float16",
        "anchor_share": "float16",
        "positions": "int32",
        "share_ptr": "int32",
        "share_ids": "int32",
        "share": "float16",
        "mass_ptr": "int32",
        "mass_ids": "int32",
        "mass": "float16",
        "group": "int32",
        "answer": "int32",
        "digest": "uint8",
        "outputs": "int32",
        "layer_mass": "float16",
    }


def test_what_was_computed_beyond_the_stop_token_is_left_out() -> None:
    tensors = make_document(2, num_outputs=5, num_recorded=6).tensors(BLOCK_SIZE)
    assert tensors["positions"].tolist() == [9, 10, 11, 12, 13]


@pytest.mark.parametrize(
    ("every", "given", "recorded"),
    [
        (1, (2, 8), (2, 8)),
        (1, (2, 30), (2, 9)),
        (3, (2, 8), (1, 2)),
        (3, (4, 5), (-1, -1)),
        (1, (20, 22), (-1, -1)),
        (1, None, (-1, -1)),
    ],
)
def test_answer_in_recorded_tokens(every: int, given: tuple[int, int] | None, recorded: tuple[int, int]) -> None:
    document = make_document(3, num_outputs=10, every=every, answer=given)
    assert tuple(document.tensors(BLOCK_SIZE)["answer"].tolist()) == recorded


def test_numbers_beyond_float16_are_refused() -> None:
    document: Document = make_document(4)
    keys = document.recording.keys.copy()
    keys[0, 0, 0, 0, 0] = np.inf
    broken = replace(document, recording=replace(document.recording, keys=keys))
    with pytest.raises(IntegrityError, match="keys of the model"):
        broken.tensors(BLOCK_SIZE)
