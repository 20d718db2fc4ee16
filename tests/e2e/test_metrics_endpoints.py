"""`/metrics` and `/flashmemory/stats` of a running server: every documented metric, and the same numbers."""

import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flashmemory_vllm.cli.server import MODEL_NAME, Server
from flashmemory_vllm.evaluation.vocabulary import BOS, encode
from flashmemory_vllm.observability.metrics import PREFIX, SERIES, MetricSpec
from tests.e2e.questions import make_questions

LABELS = {"model_name": MODEL_NAME, "engine": "0"}
PUBLISH_SECONDS = 120


def scrape(server: Server) -> dict[str, float]:
    """Our values by series; each has one sample, with vLLM's own labels and the reason, of the right type."""
    text = httpx.get(f"{server.url}/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    ours = {name: family for name, family in families.items() if name.startswith(PREFIX)}
    # The Prometheus client adds to each counter when it was created
    assert {name for name in ours if not name.endswith("_created")} == {family_name(spec) for spec in SERIES.values()}
    values = {}
    for key, spec in SERIES.items():
        family = ours[family_name(spec)]
        name, labels = PREFIX + key.partition("{")[0], {**LABELS, **spec.series[key]}
        (sample,) = [sample for sample in family.samples if sample.name == name and sample.labels == labels]
        assert family.type == spec.kind
        values[key] = sample.value
    return values


def family_name(spec: MetricSpec) -> str:
    """Prometheus drops the suffix of a counter."""
    return spec.full_name.removesuffix("_total") if spec.kind == "counter" else spec.full_name


def read_stats(server: Server) -> dict[str, float]:
    """The one engine's counters as JSON."""
    (engine,) = httpx.get(f"{server.url}/flashmemory/stats").json()["engines"]
    assert engine["engine"] == 0
    values: dict[str, float] = engine["values"]
    return values


def test_every_documented_metric_is_there_and_both_agree(server: Server) -> None:
    (question,) = make_questions("late", 8192, 1, seed=0)
    server.complete([BOS, *encode(question.prompt)], max_tokens=100)
    end = time.monotonic() + PUBLISH_SECONDS
    while (scraped := scrape(server)) != (stats := read_stats(server)) and time.monotonic() < end:
        time.sleep(0.5)
    assert scraped == stats
    assert stats["workers"] == 1
    assert stats["slots_total"] == 143
    assert 0 < stats["slots_used"] <= 143
    for counted in ("written_back_blocks", "written_back_bytes", "selections", "decode_context_blocks", "evictions"):
        assert stats[f"{counted}_total"] > 0, counted
    for histogram in ("selection_latency_seconds", "block_lifetime_steps", "block_idle_steps"):
        assert stats[f"{histogram}_count"] == stats[f'{histogram}_bucket{{le="+Inf"}}'] > 0, histogram
    # An idle server has published all: every eviction has an age, every selection was asked for
    assert stats["block_idle_steps_count"] == stats["block_lifetime_steps_count"] == stats["evictions_total"]
    assert stats["selection_latency_seconds_count"] == stats["selections_total"]
    assert 0 < stats["selected_blocks_total"] < stats["selection_candidates_total"]
    assert stats["reselected_resident_blocks_total"] <= stats["reselected_blocks_total"]
    assert stats["useful_prefetches_total"] <= stats["judged_prefetches_total"]
    share = stats["decode_resident_blocks_total"] / stats["decode_context_blocks_total"]
    assert share == pytest.approx(0.135, abs=0.02)
