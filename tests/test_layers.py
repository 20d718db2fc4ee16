"""Imports go downward only: each part of the code may import the parts its row names, no other of ours."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "flashmemory_vllm"
KERNELS = "flashmemory_kernels"
BASE = frozenset({"errors", "config", "config_text", "files", "host_memory", "own_options", "types"})

# Part of the package -> the other parts it may import; everything may import BASE and itself.
MAY_IMPORT = {
    "errors": set(),
    "types": set(),
    "config": set(),
    "config_text": set(),
    "own_options": set(),
    "files": set(),
    "host_memory": set(),
    "doctor": set(),
    "processes": set(),
    "residency": set(),
    "observability": set(),
    "transfer": {"residency", KERNELS},
    "kinds": {"transfer", KERNELS},
    "indexer": {"residency", KERNELS},
    "runtime": {"kinds", "transfer", "indexer", "residency", "observability", KERNELS},
    "reference": {"evaluation"},
    "evaluation": {"indexer", "residency", "reference", "processes", KERNELS},
    "benchmark": {"evaluation", "processes"},
    "soak": {"evaluation", "processes"},
    "capture": {"evaluation", "indexer"},
    "training": {"indexer", "residency", "evaluation", "reference", "processes", KERNELS},
    "plugin": {
        "runtime",
        "kinds",
        "transfer",
        "indexer",
        "residency",
        "observability",
        "doctor",
        "capture",
        "soak",
        "processes",
        KERNELS,
    },
    "cli": {
        "runtime",
        "kinds",
        "benchmark",
        "capture",
        "doctor",
        "reference",
        "evaluation",
        "training",
        "observability",
        "processes",
        "soak",
    },
}
# What only one part may import, and what pure parts may import beside the standard library.
ONLY_IN = {"vllm": {"plugin"}}
THIRD_PARTY_OF_PURE = {"residency": {"numpy"}, "errors": set(), "observability": {"prometheus_client"}}
# What makes the pager faster: the pager itself neither needs it nor is changed by whether it is there.
QUICK, ONLY_IN_QUICK = f"{PACKAGE}.residency.quick", {"numba"}


@dataclass(frozen=True, slots=True)
class Import:
    """One import: `module` is absolute, `late` is true inside a function."""

    module: str
    late: bool


def _imports(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late_nodes = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node in late_nodes)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            assert node.module is not None
            if node.module == PACKAGE:
                for alias in node.names:
                    yield Import(f"{PACKAGE}.{alias.name}", node in late_nodes)
            else:
                yield Import(node.module, node in late_nodes)


def _part(path: Path) -> str:
    """Folder or file of the package that a file belongs to; empty for the package's own `__init__`."""
    first = path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


PACKAGE_FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
KERNEL_FILES = sorted((ROOT / "kernels").rglob("*.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _broken_rules(path: Path) -> Iterator[str]:
    part = _part(path)
    allowed = MAY_IMPORT.get(part, set()) | BASE | {part, "__version__"}
    for found in _imports(path):
        top, _, rest = found.module.partition(".")
        target = rest.split(".")[0] if top == PACKAGE else top
        is_ours = top in {PACKAGE, KERNELS}
        late_entry = found.late and target == "plugin" and part in {"", "cli"}
        if is_ours and target not in allowed and not late_entry:
            yield f"{part or PACKAGE} must not import {found.module}"
        if part not in ONLY_IN.get(top, {part}):
            yield f"only {ONLY_IN[top]} may import {top}"
        foreign = not is_ours and top not in sys.stdlib_module_names
        is_quick = _name(path.parent).replace("/", ".") == QUICK
        may_be_there = THIRD_PARTY_OF_PURE.get(part, {top}) | (ONLY_IN_QUICK if is_quick else set())
        if foreign and top not in may_be_there:
            yield f"{part} must not import {found.module}"
        if part == "residency" and not is_quick and not found.late and found.module.startswith(QUICK):
            yield f"{part} must import {found.module} late"


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=_name)
def test_package_imports_go_downward(path: Path) -> None:
    part = _part(path)
    assert part in MAY_IMPORT or not part, f"{_name(path)} belongs to no layer: give {part!r} a row in this test"
    assert list(_broken_rules(path)) == []


@pytest.mark.parametrize("path", KERNEL_FILES, ids=_name)
def test_kernels_stand_alone(path: Path) -> None:
    tops = {found.module.split(".")[0] for found in _imports(path)}
    assert not tops & {PACKAGE, "vllm"}


def test_our_kernels_folder_is_no_package() -> None:
    """With an `__init__.py` it would shadow the published package called `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_test_folder_is_a_package() -> None:
    """Otherwise pytest would import `tests/kernels` under the name `kernels`."""
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    missing = [_name(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()]
    assert missing == []


@pytest.mark.parametrize(
    ("file", "code", "broken"),
    [
        ("residency/plan.py", "import torch", "residency must not import torch"),
        ("transfer/copy.py", "from vllm.config import VllmConfig", "only {'plugin'} may import vllm"),
        (
            "residency/plan.py",
            f"from {PACKAGE}.plugin import x",
            f"residency must not import {PACKAGE}.plugin",
        ),
        ("residency/plan.py", "import numba", "residency must not import numba"),
        ("residency/plan.py", f"from {QUICK}.books import x", f"residency must import {QUICK}.books late"),
        ("cli/app.py", f"from {PACKAGE} import plugin", f"cli must not import {PACKAGE}.plugin"),
        (
            "indexer/x.py",
            f"def f():\n    from {PACKAGE}.plugin import y",
            f"indexer must not import {PACKAGE}.plugin",
        ),
    ],
)
def test_a_broken_rule_is_found(
    file: str, code: str, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert list(_broken_rules(path)) == [broken]
