"""The list of deliberate bugs stays true: each can still be planted, its test is still there, and was seen to fail."""

import ast
import json
import shutil
from pathlib import Path

import pytest

from tests.mutations.__main__ import RESULTS
from tests.mutations.catalogue import MUTATIONS
from tests.mutations.mutation import ROOT, Mutation

LEAST = 20


def names_of_tests(path: Path) -> set[str]:
    """Names of the test functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.bug)
def test_a_bug_can_be_planted_and_its_test_exists(mutation: Mutation, tmp_path: Path) -> None:
    planted = tmp_path / mutation.path
    planted.parent.mkdir(parents=True)
    shutil.copyfile(ROOT / mutation.path, planted)
    mutation.apply(tmp_path)
    assert planted.read_text(encoding="utf-8") != (ROOT / mutation.path).read_text(encoding="utf-8")
    ast.parse(planted.read_text(encoding="utf-8"))
    file, _, name = mutation.test.partition("::")
    assert name.partition("[")[0] in names_of_tests(ROOT / file)


def test_the_bugs_are_many_and_different() -> None:
    assert len({mutation.bug for mutation in MUTATIONS}) == len(MUTATIONS) >= LEAST


def test_every_bug_was_caught_when_they_were_last_planted() -> None:
    """`python -m tests.mutations` writes the results."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert [(row["bug"], row["path"], row["test"]) for row in rows] == [mutation.key for mutation in MUTATIONS]
    assert {row["outcome"] for row in rows} == {"caught"}


def test_text_that_is_not_there_once_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    for before in ("x = 1", "y"):
        with pytest.raises(ValueError, match="allowed is once"):
            Mutation("bug", "a.py", before, "", "").apply(tmp_path)
