"""A run: parts become rows at once, are not measured twice, and servers must be what they are said to be."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flashmemory_vllm.errors import ConfigError, FlashMemoryError
from flashmemory_vllm.evaluation import target as target_module
from flashmemory_vllm.evaluation.eval_rows import Evaluation, Figures, Side, load_evaluation, save_evaluation
from flashmemory_vllm.evaluation.eval_run import EvalRun, Part, adopt_dense
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.evaluation.target import Target
from tests.unit.evaluation.eval_fakes import VERSION, FakeEngine, make_eval_row
from tests.unit.evaluation.fake_server import MODEL

PROVENANCE = Provenance("flashmemory eval", "abc", "none", {"python": "3.11"})
SERVERS: Mapping[Side, str] = {"dense": "d", "sparse": "s"}


@dataclass
class Question:
    """Asks once; counts how often it was."""

    answers: list[str] = field(default_factory=list)
    fails: bool = False

    def measure(self, target: Target) -> list[Figures]:
        if self.fails:
            raise FlashMemoryError("out of memory")
        self.answers.append(target.complete([1], 1).text)
        return [Figures(task="t", tokens=1, questions=1, score=1.0)]


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "SETTLE_SECONDS", 0)


@pytest.fixture
def sparse() -> Iterator[Target]:
    with FakeEngine(lambda _: [7], share=0.125) as server:
        yield Target.connect("sparse", server.url, MODEL)


def new_run(folder: Path) -> EvalRun:
    return EvalRun(folder, "m", SERVERS, PROVENANCE)


def test_a_row_has_what_it_was_measured_with(sparse: Target, tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.run(sparse, [Part("ruler", "p", Question(), {"limit": 3})])
    (row,) = run.evaluation.rows
    assert (row.suite, row.side, row.part, row.settings, row.score) == ("ruler", "sparse", "p", {"limit": 3}, 1.0)
    assert (row.resident_share, row.server_version, row.commit) == (0.125, VERSION, "abc")
    assert load_evaluation(tmp_path) == run.evaluation


def test_a_run_goes_on_where_it_was_stopped(sparse: Target, tmp_path: Path) -> None:
    first, second = Question(), Question(fails=True)
    parts = [Part("ruler", "first", first), Part("ruler", "second", second)]
    with pytest.raises(FlashMemoryError, match="out of memory"):
        new_run(tmp_path).run(sparse, parts)
    second.fails = False
    again = new_run(tmp_path)
    assert again.missing("sparse", parts) == parts[1:]
    assert again.missing("dense", parts) == parts
    again.run(sparse, parts)
    assert (first.answers, second.answers) == (["7"], ["7"])
    assert [row.part for row in again.evaluation.rows] == ["first", "second"]


def test_other_settings_are_another_part(sparse: Target, tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.run(sparse, [Part("ruler", "p", Question(), {"limit": 3})])
    assert run.missing("sparse", [Part("ruler", "p", Question(), {"limit": 4})])


@pytest.mark.parametrize(
    ("model", "servers", "named"),
    [("other", SERVERS, "another model"), ("m", {"dense": "d", "sparse": "x"}, "another sparse")],
)
def test_a_folder_is_for_one_model_and_its_servers(
    model: str, servers: Mapping[Side, str], named: str, tmp_path: Path
) -> None:
    save_evaluation(tmp_path, Evaluation("m", SERVERS))
    with pytest.raises(ConfigError, match=f"--out: .* holds rows of {named}"):
        EvalRun(tmp_path, model, servers, PROVENANCE)


def test_a_dense_server_that_leaves_out_blocks_is_refused(tmp_path: Path) -> None:
    with FakeEngine(lambda _: [7], share=0.5) as server:
        target = Target.connect("dense", server.url, MODEL)
        with pytest.raises(ConfigError, match=r"the dense server at .* attended to 50\.0% of its blocks"):
            new_run(tmp_path).run(target, [Part("ruler", "p", Question())])
    assert load_evaluation(tmp_path) is None


def test_dense_rows_of_another_evaluation_are_taken_once(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "new"
    rows = [make_eval_row("dense"), make_eval_row("sparse")]
    save_evaluation(source, Evaluation("m", SERVERS, rows))
    (source / "parity").mkdir()
    (source / "parity" / "dense-4096.json").write_text("[]")
    assert adopt_dense(source, folder, "m", "x") == "d"
    begun = load_evaluation(folder)
    assert begun == Evaluation("m", {"dense": "d", "sparse": "x"}, rows[:1])
    assert (folder / "parity" / "dense-4096.json").is_file()
    save_evaluation(folder, Evaluation("m", begun.servers, [make_eval_row("sparse")]))
    adopt_dense(source, folder, "m", "x")
    after = load_evaluation(folder)
    assert after is not None
    assert [row.side for row in after.rows] == ["sparse"]


def test_dense_rows_of_nothing_or_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--dense-from: .* has no rows"):
        adopt_dense(tmp_path, tmp_path / "new", "m", "x")
    save_evaluation(tmp_path, Evaluation("other", SERVERS))
    with pytest.raises(ConfigError, match=r"--dense-from: .* is of the model 'other'"):
        adopt_dense(tmp_path, tmp_path / "new", "m", "x")
