"""Every metric of ours that a page names exists."""

import re
from pathlib import Path

import pytest

from flashmemory_vllm.observability.metrics import METRICS, PREFIX
from tests.docs.pages import PAGES

_NAME = re.compile(rf"{PREFIX}[a-z][a-z0-9_]*")
# What Prometheus makes of a histogram
_PARTS = re.compile(r"_(bucket|sum|count)$")
NAMES = {spec.full_name for spec in METRICS}


def _unknown(text: str) -> set[str]:
    return {name for name in _NAME.findall(text) if not {name, _PARTS.sub("", name)} & NAMES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_metrics_that_exist(page: Path) -> None:
    assert _unknown(page.read_text(encoding="utf-8")) == set()


def test_a_metric_that_does_not_exist_is_found() -> None:
    assert _unknown(f"rate({PREFIX}evictions_total[5m]) / {PREFIX}luck") == {f"{PREFIX}luck"}
