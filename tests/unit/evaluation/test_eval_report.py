"""The report: made of the file alone, the same twice, and one HTML file that loads nothing."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.eval_plot import survival
from flashmemory_vllm.evaluation.eval_report import write_report
from flashmemory_vllm.evaluation.eval_rows import FILE_NAME, SIDES, EvalRow, Evaluation, Side, save_evaluation
from flashmemory_vllm.evaluation.gate import Limits
from flashmemory_vllm.evaluation.parity import Comparison
from tests.unit.evaluation.eval_fakes import make_eval_row, make_loss_row

COMPARED = Comparison([4, 3], [2, 3], [False, True], [[0.0, 0.25, 0.5], [0.0, 0.0, 0.0]])
WRONG = {"expected": "1 2 3", "answer": "4 | <b>5</b>"}


def rows_of(side: Side) -> list[EvalRow]:
    is_sparse = side == "sparse"
    return [
        make_eval_row(side, suite="parity", part="parity 4096", score=None, depth=None, details=asdict(COMPARED)),
        make_loss_row(side, 2.0625 if is_sparse else 2.0),
        make_eval_row(side, depth=0.0, right=[True] * 4),
        make_eval_row(
            side,
            depth=1.0,
            score=0.5 if is_sparse else 1.0,
            right=[True, not is_sparse] * 2,
            wrong=[WRONG] * 2 if is_sparse else [],
        ),
        make_eval_row(side, tokens=5000, depth=0.0, part="needles 5000"),
        make_eval_row(side, suite="ruler", task="ruler_vt", part="ruler_vt 4096", depth=None, score=0.8),
        *(
            make_eval_row(
                side, suite="longbench", task=task, part="longbench", depth=None, score=0.25, details={"unparsable": 2}
            )
            for task in ("all", "easy")
        ),
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an evaluation of all suites."""
    rows = [row for side in SIDES for row in rows_of(side)]
    servers: dict[Side, str] = {"dense": "http://dense", "sparse": "http://sparse"}
    save_evaluation(tmp_path, Evaluation("org/model", servers, rows))
    return tmp_path


def test_tables_say_what_the_rows_say(folder: Path) -> None:
    markdown, _ = write_report(folder, Limits(0.99, 0.05))
    text = markdown.read_text(encoding="utf-8")
    assert text.startswith("# Evaluation of org/model\n")
    assert "Gate: failed." in text
    assert "| needles | needle | 4,096 | 8 | 1.000 | 0.750 | 0.750 | 2 | 0 | 13.5% | fail |" in text
    assert "| ruler | ruler_vt | 4,096 | 4 | 0.800 | 0.800 | 1.000 |  |  | 13.5% | pass |" in text
    assert "| 4,096 | 2 | 19 | 2.0000 | +0.0625 | 0.0000 | +0.0625 | +0.0625 | 0.500 | 13.5% | fail |" in text
    assert "| 4,096 | sparse | 4 | 50.0% | 71.4% | 2 | 2 | 0 | 0.19 | 0.5 | 13.5% |" in text
    assert "| 100% | 1.00 / 0.50 | - / - |" in text
    assert "| mean | 1.00 / 0.75 | 1.00 / 1.00 |" in text
    assert "| 4,096 | 100% | 1 2 3 | 4 \\| <b>5</b> |" in text
    assert "| easy | 4 | 0.250 | 0.250 | 2 | 2 |" in text
    assert "http://sparse" in text
    assert re.findall(r"!\[[^]]+\]\((.*?)\)", text) == ["parity.png", "needles.png"]


def test_the_page_loads_nothing(folder: Path) -> None:
    _, page = write_report(folder, Limits())
    text = page.read_text(encoding="utf-8")
    assert text.count('src="data:image/png;base64,') == 2
    assert "<script" not in text
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert "4 | &lt;b&gt;5&lt;/b&gt;" in text
    assert "verdict" not in text


def test_the_same_rows_make_the_same_report(folder: Path) -> None:
    first = [path.read_bytes() for path in write_report(folder, Limits(0.9))]
    assert [path.read_bytes() for path in write_report(folder, Limits(0.9))] == first


def test_a_report_of_the_dense_server_alone(folder: Path) -> None:
    """What a run that was stopped half-way has."""
    save_evaluation(folder, Evaluation("org/model", {"dense": "d", "sparse": "s"}, rows_of("dense")))
    markdown, _ = write_report(folder, Limits(0.99))
    text = markdown.read_text(encoding="utf-8")
    assert "Gate: failed." in text
    assert "| 0% | 1.00 / - | 1.00 / - |" in text


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{FILE_NAME} does not exist: allowed is the --out of an earlier run"):
        write_report(tmp_path, Limits())


def test_texts_survive_until_they_part() -> None:
    assert survival(COMPARED) == ([0, 1, 2, 3, 4], [1.0, 1.0, 1.0, 0.5, 0.5])
