"""Recordings as files: what is read is what was written, windows and unions follow the definition, damage is told."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.training.dataset import Document, Schedule, TrainingData, split_documents
from tests.unit.training.recordings import Toy, write_recordings

SMALL = Toy(documents=3, prompt_blocks=8, tokens=10, per_shard=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_recordings(tmp_path, SMALL)
    return tmp_path


def _document(positions: list[int], paid: list[list[int]], answer: tuple[int, int] = (-1, -1)) -> Document:
    block_size, num_blocks = 2, 40
    pointers = torch.tensor([0, *np.cumsum([len(ids) for ids in paid])], dtype=torch.int32)
    ids = torch.tensor([block for blocks in paid for block in blocks], dtype=torch.int32)
    tensors = {
        "keys": torch.arange(num_blocks * 2.0).view(1, -1, 1, 1, 1).expand(1, -1, 1, 3, 2),
        "prompt_queries": torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 1, 2),
        # Each token pays to the block of its number
        "anchor_share": torch.eye(3 + len(positions), num_blocks),
        "answer": torch.tensor(answer, dtype=torch.int32),
        "queries": torch.full((len(positions), 1, 1, 2), 9.0),
        "positions": torch.tensor(positions, dtype=torch.int32),
        "share_ptr": pointers,
        "share_ids": ids,
        "share": (ids + 1).half() / 128,
        "mass_ptr": pointers,
        "mass_ids": ids,
        "mass": torch.full((len(ids),), 0.25, dtype=torch.float16),
    }
    return Document(tensors, block_size, chunk_size=1)


@given(
    steps=st.lists(st.integers(1, 3), min_size=1, max_size=20),
    paid=st.lists(st.sets(st.integers(0, 30)), min_size=20, max_size=20),
    tau=st.integers(1, 8),
    delay=st.integers(0, 3),
    opening_steps=st.integers(0, 5),
)
def test_union_and_mass_of_a_window_are_those_of_its_tokens(
    steps: list[int], paid: list[set[int]], tau: int, delay: int, opening_steps: int
) -> None:
    positions = (10 + np.cumsum(steps)).tolist()
    document = _document(positions, [sorted(ids) for ids in paid[: len(positions)]])
    schedule = Schedule(tau, delay, opening_steps)
    first, end = document.windows(schedule)
    for token, position in list(enumerate(positions))[1:]:
        start = position + 1 + (0 if position - positions[0] <= opening_steps else delay)
        in_force = [other for other, later in enumerate(positions) if start <= later < start + tau]
        window = int(first[token]), int(end[token])
        assert list(range(*window)) == in_force
        found = {block for other in in_force for block in paid[other]}
        shares = [(block + 1) / 128 if block in found else 0 for block in range(position // 2)]
        assert document.largest_shares(token, schedule).tolist() == shares
        mass = document.mass.sums(*window, 31)
        assert mass.tolist() == [0.25 * sum(block in paid[other] for other in in_force) for block in range(31)]


def test_a_first_selection_is_for_the_whole_answer() -> None:
    paid = [[1], [2], [3], [4], [90]]

    def looked_at(document: Document, tau: int = 1) -> list[int]:
        blocks: list[int] = np.flatnonzero(document.largest_shares(0, Schedule(tau=tau, delay=1))).tolist()
        return blocks

    assert looked_at(_document([20, 21, 22, 23, 24], paid)) == [2, 3, 4]
    assert looked_at(_document([20, 21, 22, 23, 24], paid, answer=(2, 4))) == [3, 4]
    assert looked_at(_document([20], [[1]]), tau=64) == []


def test_a_question_is_the_newest_queries_and_a_short_one_repeats_its_last() -> None:
    document = _document([20, 21], [[], []])
    assert document.question(3)[:, 0, 0, 0].tolist() == [1, 2, 9]
    assert document.question(6)[:, 0, 0, 0].tolist() == [0, 1, 2, 9, 9, 9]
    assert document.question(1)[:, 0, 0, 0].tolist() == [9]


def test_the_question_is_remembered_as_what_follows_is() -> None:
    document = _document([20, 21, 23], [[], [], []])
    memory = document.memory(3, (0.5, 1.0))
    assert memory.shape == (3, 2, 40)
    assert memory[0, 0, :5].tolist() == [0, 0.25, 0.5, 1, 0]
    assert memory[2, 0, :6].tolist() == [0, 0.03125, 0.0625, 0.125, 0.25, 1]
    assert memory[2, 1, :6].tolist() == [0, 1, 1, 1, 1, 1]
    # Of a longer question than was recorded there is what was
    assert document.memory(9, (0.5,))[0, 0, :5].tolist() == [0.125, 0.25, 0.5, 1, 0]
    assert document.memory(1, (0.5,))[0, 0, :5].tolist() == [0, 0, 0, 1, 0]


def test_a_block_comes_with_the_last_chunks_of_the_one_before() -> None:
    chunks = _document([20], [[]]).chunks(torch.tensor([5, 0]), reach=2)
    assert chunks.shape == (2, 4, 1, 1, 3, 2)
    assert chunks[:, :, 0, 0, 0, 0].tolist() == [[8, 9, 10, 11], [0, 0, 0, 1]]


def test_documents_are_found_in_their_shards(folder: Path) -> None:
    data = TrainingData(folder)
    assert (len(data), data.meta.anchor_layers, data.meta.block_size) == (3, (2, 4), 16)
    first, last = data.load(0), data.load(2)
    assert first.queries.shape == (10, 2, 4, 16)
    assert first.keys.shape == (2, 32, 2, 3, 16)
    assert (first.num_blocks, first.prompt_queries.shape) == (8, (3, 2, 4, 16))
    assert not torch.equal(first.keys, last.keys)


def test_the_split_follows_the_seed_and_leaves_out_nothing() -> None:
    train, validation = split_documents(20, 0.1, seed=3)
    assert (len(train), len(validation)) == (18, 2)
    assert sorted([*train, *validation]) == list(range(20))
    assert split_documents(20, 0.1, seed=3) == (train, validation)
    assert split_documents(20, 0.1, seed=4) != (train, validation)
    assert [len(part) for part in split_documents(2, 0.9, seed=0)] == [1, 1]
    with pytest.raises(ConfigError, match="has 1 documents: allowed is 2 or more"):
        split_documents(1, 0.1, seed=0)


def test_an_unfinished_folder_is_refused(folder: Path) -> None:
    (folder / "index.json").unlink()
    with pytest.raises(ConfigError, match=r"index\.json does not exist; allowed is the folder of a finished capture"):
        TrainingData(folder)


def test_a_truncated_shard_is_refused(folder: Path) -> None:
    shard = folder / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"shard-00001.* has not the \d+ bytes"):
        TrainingData(folder)


def test_a_wrong_shard_is_refused(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["shards"][1] |= {"documents": 2}
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="has 4 documents, its meta says 3"):
        TrainingData(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "has format 3: allowed is 4, of a capture by this version"),
        ({"documents": 4}, "has 3 documents, its meta says 4"),
    ],
)
def test_a_wrong_meta_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        TrainingData(folder)


def test_tensors_of_another_model_are_refused(folder: Path) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_query_heads": 8}))
    with pytest.raises(ConfigError, match=r"document 1 of .*: queries is \[10, 2, 4, 16\], expected \[10, 2, 8, 16\]"):
        TrainingData(folder).load(1)
