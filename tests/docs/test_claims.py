"""What README and limits say in a sentence follows from rows, scenarios and the sizing code."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashmemory_vllm.benchmark.scenario import load_scenario
from flashmemory_vllm.own_options import DEFAULT_SELECTOR, own_options
from tests.docs.pages import DOCS, README, ROOT, code_blocks
from tests.docs.test_figures import LINES as SPEED_LINES

BLOCK_SIZE = 16
# A block of Llama 8B's shape: 32 layers, keys and values of 8 heads of 128 dims in bf16
BLOCK_BYTES = 32 * 2 * 8 * 128 * 2 * BLOCK_SIZE

# The default when the rows were made
DEFAULT_OF_ROWS = "h2o"

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")
COUNTED = (("dashboards", "grafana", r'^  "uid": '), ("alerts", "prometheus", r"^ +- alert: "))


def text_of(page: Path) -> str:
    """The page on one line, as a reader sees it."""
    return " ".join(page.read_text(encoding="utf-8").split())


def rows_of(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((DOCS / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))
    return [row for row in rows if row["engine"] == "flashmemory"]


def selector_of(scenario: str, measurement: str) -> str:
    """The selector that a measurement ran with, as its file says."""
    loaded = load_scenario(ROOT / "configs" / "bench" / f"{scenario}.yaml")
    (one,) = (one for one in loaded.all_measurements() if one.name == measurement)
    return str((loaded.flashmemory | one.flashmemory).get("selector", DEFAULT_OF_ROWS))


@pytest.mark.parametrize("line", SPEED_LINES)
def test_a_speed_row_names_its_selector(line: str) -> None:
    (scenario,) = re.findall(r"\(docs/benchmarks/(p\d)\.json\)", line)
    title, selector, *_ = (cell.strip().strip("`") for cell in line.split("|")[1:])
    measured = {row["measurement"] for row in rows_of(scenario)}
    if scenario == "p4":
        measured = {"streams" if "streamed" in title else "fits"}
    assert {selector_of(scenario, measurement) for measurement in measured} == {selector}


def test_index_keys_are_counted_beside_the_resident_share() -> None:
    """The example's plan has them for every block of the host pool."""
    (plan,) = (block.text for block in code_blocks(README) if "index keys            " in block.text)
    (keys,) = re.findall(r"index keys +([\d.]+) GiB", plan)
    (host,) = re.findall(r"host blocks +[\d,]+ \(([\d.]+) GiB\)", plan)
    assert f"another {float(keys) / float(host):.1%}".replace("%", " %") in text_of(README)


def test_what_the_waiting_in_steady_decode_rests_on() -> None:
    (row,) = rows_of("p5")
    changed = row["bytes_h2d"] / BLOCK_BYTES / row["selections"]
    budget = int(0.135 * row["prompt_tokens"] / row["batch"] / BLOCK_SIZE)
    assert f"random weights change about {changed:.0f} of {budget} blocks in a selection" in text_of(README)


def test_the_speed_of_short_requests_is_that_of_the_rows() -> None:
    ratios = [row["ratio"] for row in rows_of("p6")]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} times stock vLLM's speed" in text_of(DOCS / "limits.md")


@pytest.mark.parametrize(
    ("words", "task"),
    [
        ("single needles", "multikey"),
        ("one key with three values", "multivalue"),
        ("three keys", "multiquery"),
        ("two-hop questions", "tracking"),
    ],
)
def test_the_accuracies_of_a_selector_are_those_of_the_rows(words: str, task: str) -> None:
    rows = json.loads((DOCS / "results" / "core.json").read_text(encoding="utf-8"))
    (accuracy,) = (
        row["accuracy"]
        for row in rows
        if (row["task"], row["selector"], row["tokens"]) == (task, DEFAULT_OF_ROWS, 32768)
    )
    assert f"with `{DEFAULT_OF_ROWS}`, the default when these rows were made" in text_of(DOCS / "limits.md")
    (said,) = re.findall(rf"(\d+) % (?:of those )?to {words}", text_of(DOCS / "limits.md"))
    assert abs(float(said) - 100 * accuracy) <= 0.5


def test_the_default_is_not_behind_what_it_replaced_and_loses_nothing_by_fp8() -> None:
    rows = json.loads((DOCS / "results" / "default.json").read_text(encoding="utf-8"))
    one_question = 1 / 40 + 1e-9

    def accuracies(selector: str, options: list[list[str]]) -> dict[str, float]:
        tau = own_options(selector).tau_steps
        key = (selector, tau, options, None)
        return {
            row["task"]: row["accuracy"]
            for row in rows
            if (row["selector"], row["tau"], row["options"], row["query_window"]) == key
        }

    default = accuracies(DEFAULT_SELECTOR, [])
    assert len(default) == 7
    for other in ("h2o", "streaming"):
        assert all(default[task] >= accuracy - one_question for task, accuracy in accuracies(other, []).items())
    of_keys = accuracies(DEFAULT_SELECTOR, [["index_dtype", "auto"]])
    assert len(of_keys) == 5
    assert all(abs(default[task] - accuracy) <= one_question for task, accuracy in of_keys.items())


def test_the_readme_installs_before_it_serves() -> None:
    text = README.read_text(encoding="utf-8")
    assert 0 < text.index("pip install") < text.index("vllm serve")


def test_nothing_asks_for_a_higher_memlock_limit() -> None:
    """CUDA pins in its driver, which does not ask it; see `host_memory.py`."""
    pages = [*DOCS.rglob("*.md"), *(ROOT / "flashmemory_vllm").rglob("*.py")]
    for page in pages:
        assert not re.search(r"raise the memlock|ulimit -l|--ulimit memlock", page.read_text(encoding="utf-8")), page


@pytest.mark.parametrize("word", ["opening steps", "frame", "worth a slot", "due"])
def test_the_glossary_has_the_words_that_only_we_use(word: str) -> None:
    _, _, rest = (DOCS / "architecture.md").read_text(encoding="utf-8").partition("## Words")
    table, _, _ = rest.partition("\n## ")
    assert f"| {word} |" in table


@pytest.mark.parametrize(("what", "folder", "pattern"), COUNTED)
def test_as_many_as_there_are(what: str, folder: str, pattern: str) -> None:
    files = (ROOT / "deploy" / folder).iterdir()
    found = [match for path in files for match in re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)]
    assert f"{NUMBERS[len(found)]} {what}" in text_of(DOCS / "operate.md")


def refused_options() -> Iterator[str]:
    """What the code refuses by the name of an option."""
    tree = ast.parse((ROOT / "flashmemory_vllm" / "plugin" / "refusals.py").read_text(encoding="utf-8"))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    for call in calls:
        if call.func.id in {"Refusal", "_more_than_one"}:  # type: ignore[attr-defined]
            named = call.args[call.func.id == "Refusal"]  # type: ignore[attr-defined]
            if isinstance(named, ast.Constant) and str(named.value).startswith(("--", "flashmemory.")):
                yield str(named.value).removeprefix("--attention-config.")


def test_the_list_of_what_is_refused_is_whole() -> None:
    refused = set(refused_options())
    assert len(refused) > 20
    page = (DOCS / "limits.md").read_text(encoding="utf-8")
    assert [option for option in sorted(refused) if f"`{option}`" not in page] == []
