"""Generated parts of the docs: committed pages are up to date, and stale ones are found and mended."""

import shutil
from pathlib import Path

import pytest

from flashmemory_vllm.cli import docs
from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.observability.metrics import METRICS, MetricSpec

COMMITTED = Path(__file__).parents[3] / "docs"


def test_committed_pages_are_up_to_date() -> None:
    stale = [path.name for path, _ in docs.stale_pages(COMMITTED)]
    assert stale == [], "run `flashmemory docs`"


@pytest.mark.parametrize("name", FlashMemoryConfig.model_fields)
def test_every_option_has_a_row(name: str) -> None:
    assert f"| `{name}` |" in docs.options_table()


@pytest.mark.parametrize("spec", METRICS, ids=lambda spec: spec.name)
def test_every_metric_has_a_row(spec: MetricSpec) -> None:
    assert f"| `{spec.full_name}` | {spec.kind} |" in docs.metrics_table()


def _copy_pages(folder: Path) -> None:
    shutil.copytree(COMMITTED, folder, dirs_exist_ok=True)


def test_check_fails_on_a_stale_page_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _copy_pages(tmp_path)
    page = tmp_path / "metrics.md"
    stale = page.read_text().replace("flashmemory:evictions_total", "flashmemory:old_name")
    page.write_text(stale)
    assert docs.main(["--folder", str(tmp_path), "--check"]) == 1
    assert "metrics.md is out of date" in capsys.readouterr().out
    assert page.read_text() == stale


def test_writing_mends_the_generated_part_and_keeps_the_prose(tmp_path: Path) -> None:
    _copy_pages(tmp_path)
    page = tmp_path / "metrics.md"
    page.write_text(page.read_text().replace("evictions_total", "old_name") + "\nProse below.\n")
    assert docs.main(["--folder", str(tmp_path)]) == 0
    assert page.read_text() == (COMMITTED / "metrics.md").read_text() + "\nProse below.\n"
    assert docs.main(["--folder", str(tmp_path), "--check"]) == 0


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ConfigError, match="no generated part"):
        docs.render("# Metrics\n", "table")


def test_a_missing_page_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        docs.main(["--folder", str(tmp_path)])
