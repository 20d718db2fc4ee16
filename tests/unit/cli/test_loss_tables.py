"""The page of real models shows the committed rows: each once, the smallest loss first, with dense attention's."""

import json
from pathlib import Path
from typing import Any

from flashmemory_vllm.cli.loss_tables import loss_tables

COMMITTED = Path(__file__).parents[3] / "docs"


def test_rows_are_by_model_and_length_and_the_best_comes_first(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = json.loads((COMMITTED / "results" / "real.json").read_text())
    first = rows[0] | {"model": "M", "context": 9000, "dense": 1.5, "se": None, "blocks_per_token": None, "tau": 4}
    changed = [
        first | {"cell": "worse", "gap": 0.25, "device_share": None},
        first | {"cell": "better", "gap": 0.125, "device_share": 0.16},
        rows[0] | {"model": "N", "context": 100},
    ]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "real.json").write_text(json.dumps(changed))
    page = loss_tables(tmp_path)
    assert page.index("### M, 9,000 tokens") < page.index("### N, 100 tokens")
    assert "Dense attention: 1.500 nats a token." in page
    better, worse = page.index("| better |"), page.index("| worse |")
    assert better < worse
    assert page[better:worse].split(" | ")[4:8] == ["0.125", "", "", "16.0%"]
    assert page.count(f"commit {first['commit']}") == 1, "where rows come from is told once"


def test_the_default_is_marked_where_no_option_of_a_selection_is_given() -> None:
    rows: list[dict[str, Any]] = json.loads((COMMITTED / "results" / "real.json").read_text())
    assert {row["cell"].split("-")[0] for row in rows if row["default"]} == {"default"}
    assert all(row["gap"] > 0 and row["documents"] >= 32 and row["commit"] for row in rows)
