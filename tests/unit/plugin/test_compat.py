"""The ledger of what we change in vLLM is complete, and names only what there is. Nothing is imported for it."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.docs.pages import ROOT

PACKAGE = ROOT / "flashmemory_vllm"
COMPAT = PACKAGE / "plugin" / "compat.py"
LEDGER = ast.get_docstring(ast.parse(COMPAT.read_text(encoding="utf-8"))) or ""
ENTRIES = re.findall(r"^- `([\w/]+\.py)` `([\w.]+)`", LEDGER, re.MULTILINE)


def private_uses(source: str) -> Iterator[str]:
    """Names of vLLM with a leading underscore that a module imports, or reads from what it has imported."""
    tree = ast.parse(source)
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
            imported |= {alias.asname or alias.name for alias in node.names}
            yield from (alias.name for alias in node.names if _is_private(alias.name))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id in imported and _is_private(node.attr):
            yield node.attr


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def definitions(source: str) -> set[str]:
    """Functions and classes of a module, methods with their class before them."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


def test_the_ledger_has_entries() -> None:
    assert len(ENTRIES) >= 6


@pytest.mark.parametrize(("module", "name"), ENTRIES)
def test_an_entry_names_what_there_is(module: str, name: str) -> None:
    assert name in definitions((PACKAGE / module).read_text(encoding="utf-8"))


def test_every_private_name_of_vllm_is_in_the_ledger() -> None:
    others = [path for path in PACKAGE.rglob("*.py") if path != COMPAT]
    used = {name for path in others for name in private_uses(path.read_text(encoding="utf-8"))}
    assert used, "the search finds nothing"
    assert {name for name in used if name not in LEDGER} == set()


@pytest.mark.parametrize(
    ("module", "owner"),
    [("admission.py", "FlashMemoryManager."), ("hybrid_admission.py", "HybridManager.")],
)
def test_every_method_of_vllms_block_manager_that_is_overridden_is_in_the_ledger(module: str, owner: str) -> None:
    names = definitions((PACKAGE / "plugin" / module).read_text(encoding="utf-8"))
    methods = {name for name in names if name.startswith(owner) and "._" not in name}
    entered = {name for _, name in ENTRIES}
    assert methods, "the search finds nothing"
    assert methods <= entered


@pytest.mark.parametrize(
    "source",
    ["from vllm.a import _secret", "from vllm.a import Registry\nRegistry._secret()"],
)
def test_a_private_name_is_found(source: str) -> None:
    assert list(private_uses(source)) == ["_secret"]


def test_every_change_in_compat_says_when_it_can_go() -> None:
    functions = [
        node for node in ast.parse(COMPAT.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    ]
    changes = [node for node in functions if not node.name.startswith(("_", "check_"))]
    assert len(changes) >= 5
    for node in changes:
        text = ast.get_docstring(node) or ""
        assert all(word in text for word in ("Symptom:", "Cure:", "Remove when")), node.name
