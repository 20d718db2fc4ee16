"""Loops are compiled where that is safe, and use nothing of other files."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from flashmemory_vllm.residency import entries, lists, slot_arrays
from flashmemory_vllm.residency.asked import Ask
from flashmemory_vllm.residency.quick import (
    asking_loops,
    change_loops,
    compiled,
    growth_loops,
    note_loops,
    slot_loops,
)
from flashmemory_vllm.residency.quick.compiled import IS_COMPILED, loop, plain
from flashmemory_vllm.runtime import choice_loops

MODULES = (change_loops, slot_loops, note_loops, asking_loops, growth_loops, choice_loops)
needs_numba = pytest.mark.skipif(not IS_COMPILED, reason="numba is not there")


@needs_numba
def test_code_is_kept_only_where_nobody_else_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source.py"
    assert compiled._is_ours(tmp_path / "__pycache__", source)
    elsewhere = tmp_path / "elsewhere" / "kept"
    elsewhere.mkdir(mode=0o700, parents=True)
    assert compiled._is_ours(elsewhere, source)
    elsewhere.chmod(0o770)
    assert not compiled._is_ours(elsewhere, source)
    elsewhere.chmod(0o700)
    for mode, is_safe in ((0o777, False), (0o1777, True)):
        elsewhere.parent.chmod(mode)
        assert compiled._is_ours(elsewhere, source) == is_safe
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    elsewhere.chmod(0o700)
    assert not compiled._is_ours(elsewhere, source)


def test_without_numba_a_loop_is_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def one() -> int:
        return 1

    monkeypatch.setattr(compiled, "IS_COMPILED", False)
    assert loop(one) is one
    assert plain(one) is one


def test_loops_know_the_columns() -> None:
    """They are told again there, for code on disk does not follow other files."""
    for module in (asking_loops, note_loops, change_loops):
        for ask in Ask:
            assert getattr(module, ask.name, ask) == ask, (module, ask)
    for name in ("COMES", "GOES", "WORTH", "HEADER", "NOBODY"):
        assert getattr(note_loops, name) == getattr(lists, name)
    assert (change_loops.HEADER, change_loops.NOBODY) == (lists.HEADER, lists.NOBODY)
    assert change_loops.NOT_RESIDENT == slot_arrays.NOT_RESIDENT
    assert (change_loops.NULL_SLOT, change_loops.NO_ENTRY) == (slot_arrays.NULL_SLOT, entries.NO_ENTRY)
    assert (change_loops.NOT_DONE, change_loops.BROKEN) == (slot_loops.NOT_DONE, slot_loops.BROKEN)
    assert asking_loops.NOT_DONE == growth_loops.NOT_DONE == change_loops.NOT_DONE
    assert growth_loops.NULL_SLOT == change_loops.NULL_SLOT
    assert slot_loops.NO_OWNER == slot_arrays.NO_OWNER


def of_other_files(source: str) -> Iterator[str]:
    """Names of ours that the loops of a file use and that stand in another one."""
    tree = ast.parse(source)
    ours = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flashmemory")
        for alias in node.names
    }
    for function in tree.body:
        for line in function.body if isinstance(function, ast.FunctionDef) else ():
            names = (node.id for node in ast.walk(line) if isinstance(node, ast.Name))
            yield from (name for name in names if name in ours)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rsplit(".", 1)[1])
def test_a_loop_uses_its_own_file_alone(module: ModuleType) -> None:
    """Code on disk is as old as its own file: it would go on with what another one said then."""
    assert list(of_other_files(inspect.getsource(module))) == []


def test_what_a_loop_uses_of_another_file_is_found() -> None:
    source = "from flashmemory_vllm.residency.lists import HEADER\n\n\ndef f(row):\n    return row[HEADER]\n"
    assert list(of_other_files(source)) == ["HEADER"]
