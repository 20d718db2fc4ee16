"""Accuracy rows for tests that read them."""

from typing import Any

from flashmemory_vllm.evaluation.accuracy_rows import AccuracyRow


def make_row(**changes: Any) -> AccuracyRow:
    fields: dict[str, Any] = {
        "model": "toy",
        "block_size": 16,
        "task": "multikey",
        "tokens": 600,
        "selector": "exact",
        "tau": 16,
        "ratio": 0.125,
        "groups": 1,
        "anchors": None,
        "questions": 12,
        "accuracy": 0.75,
        "dense_accuracy": 1.0,
        "resident_share": 0.125,
        "recalled_blocks": 36,
        "device_bytes_index_per_block": 0.0,
        "command": "flashmemory accuracy",
        "commit": "abc",
        "gpu": "a device",
        "versions": {"torch": "2"},
        "batch": 64,
    }
    return AccuracyRow(**fields | changes)
