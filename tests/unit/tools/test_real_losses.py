"""Cells of a plan become evaluations, and these become rows that say what was run, and what it took of the device."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from flashmemory_vllm.config import SECTION, FlashMemoryConfig
from flashmemory_vllm.evaluation.eval_rows import Evaluation, save_evaluation
from flashmemory_vllm.reference import reference_model_path
from tests.helpers.modules import ROOT
from tests.tools import real_losses
from tests.unit.evaluation.eval_fakes import make_loss_row

PLANS = sorted((ROOT / "configs" / "loss").glob("*.yaml"))
PLAN = {
    "model": "M",
    "serve-args": "--block-size 16",
    "dense-args": "--max-num-seqs 4",
    "documents": 2,
    "concurrency": 2,
    "context": 6000,
    "options": {"min_sparse_tokens": 0},
    "cells": {
        "default": {},
        "tight": {"resident_ratio": 0.07},
        "exact-4": {"selector": "exact", "tau_steps": 4},
        "longer": {"context": 7500},
    },
}


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plans_name_options_that_there_are(path: Path) -> None:
    plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    cells = real_losses.read_cells(plan)
    for cell in cells:
        FlashMemoryConfig.from_additional_config({SECTION: cell.options})
    assert "--block-size 16" in plan["serve-args"]


def test_every_cell_is_measured_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[dict[str, str]] = []

    def evaluate(words: Sequence[str], check: bool) -> None:
        assert check
        assert words[3] == "eval"
        given = dict(zip([name.removeprefix("--") for name in words[4::2]], words[5::2], strict=True))
        runs.append(given)
        tokens = int(given["lengths"])
        rows = [make_loss_row("dense", 2.0, tokens=tokens), make_loss_row("sparse", 2.25, tokens=tokens)]
        save_evaluation(Path(given["out"]), Evaluation("M", {"dense": "", "sparse": ""}, rows))

    monkeypatch.setattr(subprocess, "run", evaluate)
    plan, rows, out = tmp_path / "plan.yaml", tmp_path / "rows.json", tmp_path / "out"
    plan.write_text(yaml.safe_dump(PLAN, sort_keys=False))
    rows.write_text(json.dumps([{"model": "M", "cell": "older", "gpu": "x"}]))
    words = [str(plan), "--model", str(reference_model_path()), "--texts", "t", "--out", str(out), "--rows", str(rows)]
    assert real_losses.main(words) == 0

    from_dense = {Path(run["out"]).name: run.get("dense-from") for run in runs}
    assert from_dense == {
        "default": None,
        "tight": str(out / "default"),
        "exact-4": str(out / "default"),
        "longer": None,
    }
    assert [run["lengths"] for run in runs if Path(run["out"]).name == "longer"] == ["7500"]
    assert all(("dense-args" in run) == ("dense-from" not in run) for run in runs), "no dense server, no options of it"
    found: list[dict[str, Any]] = json.loads(rows.read_text())
    assert [row["cell"] for row in found] == ["older", "default", "tight", "exact-4", "longer"]
    default, tight, exact, _ = found[1:]
    assert (default["default"], tight["default"], exact["default"]) == (True, True, False)
    assert (exact["selector"], exact["tau"], exact["context"], tight["ratio"]) == ("exact", 4, 6000, 0.07)
    assert default["gap"] == pytest.approx(0.25)
    # Resident blocks, and the keys of three anchors, half of what such a layer keeps
    layers = json.loads((reference_model_path() / "config.json").read_text())["num_hidden_layers"]
    # Keys of three layers, in a byte instead of two, and a scale for each block and KV head
    assert exact["device_share"] == pytest.approx(0.135 + 3 / (4 * layers), abs=1e-3)

    assert real_losses.main([*words, "--only", "exact-4"]) == 0
    assert len(json.loads(rows.read_text())) == 5, "a row takes the place of the older one"
    assert [Path(run["out"]).name for run in runs[4:]] == ["default", "exact-4"], "the dense losses are always there"
    assert runs[-1]["dense-from"] == str(out / "default")
