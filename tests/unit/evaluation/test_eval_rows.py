"""The file of an evaluation: written, read, and refused."""

from pathlib import Path

import pytest

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.eval_rows import FILE_NAME, Evaluation, load_evaluation, save_evaluation
from tests.unit.evaluation.eval_fakes import make_eval_row


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    rows = [make_eval_row("dense"), make_eval_row("sparse", wrong=[{"expected": "1", "answer": "2"}], right=[False])]
    saved = Evaluation("m", {"dense": "d", "sparse": "s"}, rows)
    save_evaluation(tmp_path / "new", saved)
    assert load_evaluation(tmp_path / "new") == saved
    assert load_evaluation(tmp_path) is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("text", ["[]", "{}", "no", '{"model": "m", "servers": {"dense": "d"}, "rows": []}'])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ConfigError, match=r"eval\.json \(.*\): allowed is what flashmemory eval writes"):
        load_evaluation(tmp_path)


def test_pairs_have_the_same_questions() -> None:
    dense = [make_eval_row("dense", depth=depth) for depth in (0.0, 1.0)]
    sparse = [make_eval_row("sparse", depth=1.0), make_eval_row("sparse", depth=0.0, settings={"seed": 1})]
    evaluation = Evaluation("m", {"dense": "d", "sparse": "s"}, [*dense, *sparse])
    assert list(evaluation.pairs()) == [(dense[1], sparse[0])]
    assert evaluation.of("needles", "dense") == dense
    assert evaluation.has("sparse", "needles 4096", {"seed": 1})
    assert not evaluation.has("sparse", "needles 4096", {"seed": 2})


def test_a_row_is_sparse_if_its_server_left_out_blocks() -> None:
    assert make_eval_row("sparse", resident_share=0.5).is_sparse
    assert make_eval_row("sparse", resident_share=None).is_sparse
    assert not make_eval_row("sparse", resident_share=1.0).is_sparse
    assert not make_eval_row("dense", resident_share=0.5).is_sparse
