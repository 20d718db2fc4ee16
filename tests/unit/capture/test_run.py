"""Documents are written in order, whichever ends first, and never more of them are held than two batches."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from flashmemory_vllm.capture.document import Recording
from flashmemory_vllm.capture.prompts import Prompt
from flashmemory_vllm.capture.run import record
from flashmemory_vllm.capture.writer import CaptureWriter
from tests.unit.capture.documents import make_document, make_meta

BATCH = 3


class Engine:
    """Finishes a random prompt of those under way at each step; can break."""

    def __init__(self, breaks_at: int = 1000) -> None:
        self.running: dict[str, Prompt] = {}
        self.submitted: list[int] = []
        self.ended: list[int] = []
        self.most = 0
        self._breaks_at = breaks_at
        self._rng = np.random.default_rng(0)

    def submit(self, name: str, prompt: Prompt) -> None:
        self.running[name] = prompt
        self.submitted.append(int(name))
        self.most = max(self.most, len(self.running))

    def finished(self) -> Iterator[tuple[str, list[int], Recording]]:
        if len(self.ended) == self._breaks_at:
            raise KeyboardInterrupt
        name = sorted(self.running)[self._rng.integers(len(self.running))]
        del self.running[name]
        self.ended.append(int(name))
        document = make_document(int(name))
        yield name, list(document.output_ids), document.recording


PROMPTS = [make_document(number).prompt for number in range(20)]


def digests(folder: Path) -> list[bytes]:
    found = []
    for path in sorted(folder.glob("shard-*.safetensors")):
        shard = load_file(path)
        count = sum(name.endswith(".digest") for name in shard)
        found += [shard[f"doc{index}.digest"].tobytes() for index in range(count)]
    return found


def test_order_and_bound(tmp_path: Path) -> None:
    engine = Engine()
    record(engine, PROMPTS, CaptureWriter(tmp_path, make_meta(), 1 << 30), every=1, batch=BATCH)
    assert engine.ended != sorted(engine.ended)
    assert digests(tmp_path) == [prompt.digest for prompt in PROMPTS]
    assert engine.most <= 2 * BATCH


def test_an_interrupted_capture_loses_only_what_had_not_ended(tmp_path: Path) -> None:
    first = Engine(breaks_at=11)
    with pytest.raises(KeyboardInterrupt):
        record(first, PROMPTS, CaptureWriter(tmp_path, make_meta(), 1 << 30), every=1, batch=BATCH)
    assert not (tmp_path / "index.json").exists()
    kept = len(digests(tmp_path))
    assert kept >= 11 - 2 * BATCH
    second = Engine()
    record(second, PROMPTS, CaptureWriter(tmp_path, make_meta(), 1 << 30), every=1, batch=BATCH)
    assert second.submitted == list(range(kept, len(PROMPTS)))
    assert digests(tmp_path) == [prompt.digest for prompt in PROMPTS]


def test_the_limit_completes_the_folder(tmp_path: Path) -> None:
    record(Engine(), PROMPTS, CaptureWriter(tmp_path, make_meta(), 40_000), every=1, batch=BATCH)
    kept = digests(tmp_path)
    assert 0 < len(kept) < len(PROMPTS)
    assert kept == [prompt.digest for prompt in PROMPTS[: len(kept)]]
    assert json.loads((tmp_path / "meta.json").read_text())["documents"] == len(kept)
