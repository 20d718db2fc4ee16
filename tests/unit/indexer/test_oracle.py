"""The oracle scores what is to come, for the request that asks, and exists only where a future was put into place."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from flashmemory_vllm.errors import ConfigError, IntegrityError
from flashmemory_vllm.indexer import IndexGeometry
from flashmemory_vllm.indexer.oracle import Future, OracleSelector, window_scores
from flashmemory_vllm.runtime.shape import AttentionShape
from tests.helpers.alone import Alone, OneByOne

BS, LAYERS, TAU, DELAY, PROMPT = 4, 5, 6, 1, 17
DIGESTS = [bytes([number] * 32) for number in range(3)]


def make_geometry(num_groups: int = 2, block_size: int = BS) -> IndexGeometry:
    return IndexGeometry(
        num_logical_blocks=30,
        block_size=block_size,
        num_query_heads=4,
        num_kv_heads=2,
        head_dim=8,
        softmax_scale=1.0,
        anchor_layers=(0,),
        layer_groups=(0,),
        num_groups=num_groups,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def recorded(number: int) -> dict[str, Any]:
    """One document of 20 recorded tokens."""
    rng = np.random.default_rng(number)
    return {
        "digest": np.frombuffer(DIGESTS[number], np.uint8),
        "positions": np.arange(PROMPT - 1, PROMPT + 19, dtype=np.int32),
        "layer_mass": rng.random((2, 20, LAYERS, 9)).astype(np.float16),
    }


def write_capture(folder: Path, **provenance: object) -> Path:
    """Three documents in two shards, with what the oracle reads of them."""
    for shard, numbers in enumerate(((0, 1), (2,))):
        tensors = {f"doc{i}.{name}": value for i, n in enumerate(numbers) for name, value in recorded(n).items()}
        save_file(tensors, folder / f"shard-0000{shard}.safetensors", metadata={"documents": str(len(numbers))})
    meta = {"block_size": BS, "provenance": {"layer_mass": True, "every": 1, **provenance}}
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "index.json").write_text("{}")
    return folder


@contextmanager
def known(future: Future) -> Iterator[None]:
    OracleSelector.future = future
    try:
        yield
    finally:
        OracleSelector.future = None


@given(
    seed=st.integers(0, 1000),
    first=st.integers(0, 25),
    length=st.integers(1, 12),
    num_groups=st.integers(1, LAYERS),
    aggregate=st.sampled_from(["mean", "max"]),
)
def test_window_against_its_definition(seed: int, first: int, length: int, num_groups: int, aggregate: Any) -> None:
    mass = np.random.default_rng(seed).random((2, 20, LAYERS, 3)).astype(np.float16)
    shape = AttentionShape(tuple("abcde"), 4, 2, 8, 1.0, BS, torch.float32, torch.device("cpu"))
    tokens = [token for token in range(first, first + length) if token < 20] or [19]
    expected = np.zeros((num_groups, 3))
    for group, layers in enumerate(shape.layer_groups(num_groups)):
        for block in range(3):
            cells = [float(mass[int(aggregate == "max"), t, layer, block]) for t in tokens for layer in layers]
            expected[group, block] = max(cells) if aggregate == "max" else sum(cells) / len(cells)
    found = window_scores(mass, first, first + length, num_groups, aggregate)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_each_request_sees_its_own_future(tmp_path: Path, aggregate: Any) -> None:
    future = Future.load(write_capture(tmp_path))
    with known(future):
        selector = OracleSelector(make_geometry(), aggregate, TAU)
    future.name("a-1", DIGESTS[2])
    future.name("b-2", DIGESTS[0])
    for req_id, number in (("a-1", 2), ("b-2", 0)):
        mass = recorded(number)["layer_mass"]
        # The last prompt token has just been computed: the selection is in force with the next one
        future.advance(req_id, PROMPT)
        first = OneByOne(selector).score(Alone(req_id, torch.arange(4), None, step_index=0))
        expected = window_scores(mass, 1, 1 + TAU + DELAY, 2, aggregate)[:, :4]
        torch.testing.assert_close(first, torch.from_numpy(expected))
        # Five outputs later; this one comes late
        future.advance(req_id, PROMPT + 5)
        later = OneByOne(selector).score(Alone(req_id, torch.arange(5), None, step_index=1))
        expected = window_scores(mass, 6 + DELAY, 6 + TAU + DELAY, 2, aggregate)[:, :5]
        torch.testing.assert_close(later, torch.from_numpy(expected))


def test_a_longer_text_and_a_finished_request(tmp_path: Path) -> None:
    future = Future.load(write_capture(tmp_path))
    with known(future):
        selector = OracleSelector(make_geometry(1), "max", TAU)
    future.name("a", DIGESTS[1])
    future.advance("a", PROMPT + 60)
    scores = OneByOne(selector).score(Alone("a", torch.arange(12), None, step_index=7))
    assert scores.shape == (1, 12)
    assert bool(scores[:, :9].any())
    assert not bool(scores[:, 9:].any())
    selector.forget("a")
    assert torch.equal(OneByOne(selector).score(Alone("a", torch.arange(12), None, step_index=7)), scores)


def test_a_runtime_can_warm_up(tmp_path: Path) -> None:
    with known(Future.load(write_capture(tmp_path))):
        selector = OracleSelector(make_geometry())
    assert OneByOne(selector).score(Alone("", torch.zeros(1, dtype=torch.int64), None, 0)).tolist() == [[0.0], [0.0]]


def test_nobody_else_can_use_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="for evaluation only"):
        OracleSelector(make_geometry())
    future = Future.load(write_capture(tmp_path))
    with known(future):
        selector = OracleSelector(make_geometry())
        with pytest.raises(ConfigError, match="blocks of 4 tokens, --block-size is 8"):
            OracleSelector(make_geometry(block_size=8))
        with pytest.raises(ConfigError, match="aggregate must be one of max, mean"):
            OracleSelector(make_geometry(), "sum")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="was not recorded"):
        future.name("x", b"\xff" * 32)
    with pytest.raises(IntegrityError, match="request x is unknown"):
        OneByOne(selector).score(Alone("x", torch.arange(4), None, 0))


@pytest.mark.parametrize("provenance", [{"layer_mass": False}, {"every": 2}])
def test_a_capture_that_does_not_tell_enough_is_refused(tmp_path: Path, provenance: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="allowed is a capture with --layer-mass and --every 1"):
        Future.load(write_capture(tmp_path, **provenance))


def test_an_unfinished_capture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="complete capture"):
        Future.load(tmp_path)
