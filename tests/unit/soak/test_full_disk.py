"""A soak that meets a full disk: whole files, whole lines, and a reason."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flashmemory_vllm.errors import StorageError
from flashmemory_vllm.soak.adapter import write_adapter
from flashmemory_vllm.soak.drive import Text
from flashmemory_vllm.soak.process import SoakFolder
from flashmemory_vllm.soak.rows import save_rows
from flashmemory_vllm.soak.trace import draw_trace
from tests.helpers.disk import full_disk
from tests.unit.soak.test_rows import row
from tests.unit.soak.traces import settings

FEW_BYTES = 2048
MODEL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


def write_model(folder: Path) -> Path:
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL))
    return model


WRITERS: dict[str, Callable[[Path], object]] = {
    "trace": lambda folder: draw_trace(settings()).save(folder / "trace.json"),
    "rows": lambda folder: save_rows(folder / "rows.json", [row()] * 2),
    "document": lambda folder: SoakFolder(folder).write("outcome", {"hanging": ["soak-1"] * FEW_BYTES}),
    "adapter": lambda folder: write_adapter(write_model(folder), folder, 1),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_nothing_is_there_by_half(tmp_path: Path, write: Callable[[Path], object]) -> None:
    with full_disk(FEW_BYTES), pytest.raises(StorageError, match="Make room"):
        write(tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []


def test_texts_before_it_can_be_read(tmp_path: Path) -> None:
    folder = SoakFolder(tmp_path)
    texts = [Text(f"soak-{index}", 0, tuple(range(200))) for index in range(9)]

    def keep() -> None:
        for text in texts:
            folder.keep(text)

    with full_disk(FEW_BYTES), pytest.raises(StorageError, match=r"texts.jsonl: cannot be written"):
        keep()
    kept = folder.texts()
    assert 0 < len(kept) < len(texts)
    assert kept == texts[: len(kept)]
