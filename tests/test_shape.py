"""Files and functions stay short enough to be read at once, and no duration is read off a clock that can jump."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = {"flashmemory_vllm": 300, "kernels": 600, "tests": 400, "deploy": 300}
FILES = sorted(path for folder in MAX_FILE_LINES for path in (ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _is_triton_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def _long_functions(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_triton_kernel(node):
            continue
        num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if num_lines > MAX_FUNCTION_LINES:
            yield f"{node.name} has {num_lines} lines"


def test_there_are_files_to_check() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} >= {"flashmemory_vllm", "tests"}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_file_and_its_functions_are_short(path: Path) -> None:
    limit = MAX_FILE_LINES[path.relative_to(ROOT).parts[0]]
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= limit, f"{_name(path)} has {num_lines} lines, allowed are {limit}: split it by duty"
    assert list(_long_functions(path)) == []


def test_a_long_function_is_found(tmp_path: Path) -> None:
    lines = ["def long() -> None:", *["    pass"] * MAX_FUNCTION_LINES]
    file = tmp_path / "long.py"
    file.write_text("\n".join(lines))
    assert list(_long_functions(file)) == ["long has 61 lines"]


@pytest.mark.parametrize("path", [path for path in FILES if _name(path).startswith("flashmemory_vllm")], ids=_name)
def test_a_clock_that_is_set_changes_no_duration(path: Path) -> None:
    # The wall clock jumps when it is set; deadlines and durations are those of `time.monotonic` and `perf_counter`
    assert re.findall(r"\btime\.time(?:_ns)?\(|import time as|from time import", path.read_text(encoding="utf-8")) == []
