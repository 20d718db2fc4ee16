"""Nothing that is read can run code, no shell is asked, and every dependency has a range and a reason."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("flashmemory_vllm", "kernels", "deploy") for path in (ROOT / folder).rglob("*.py"))
# Modules whose files are programs, and calls that are only allowed with one of these arguments, or without any
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
NEEDED = {"torch.load": ("weights_only", True)}
BANNED_CALLS = {
    "os.system",
    "os.popen",
    "tempfile.mktemp",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "eval",
    "exec",
}
BANNED_VALUES = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "weights_only": False}


def unsafe(code: str) -> Iterator[str]:
    """What in a module could run what is only to be read."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in BANNED_MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        if called in BANNED_CALLS:
            yield f"calls {called}"
        if called in NEEDED and given.get(NEEDED[called][0]) is not NEEDED[called][1]:
            yield f"calls {called} without {NEEDED[called][0]}={NEEDED[called][1]}"
        yield from (f"{called}({name}={value})" for name, value in BANNED_VALUES.items() if given.get(name) is value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_read_cannot_run(path: Path) -> None:
    assert list(unsafe(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import pickle", "imports pickle"),
        ("from torch import load\nimport torch\ntorch.load(path)", "calls torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "calls torch.load without weights_only=True"),
        ("numpy.load(path, allow_pickle=True)", "numpy.load(allow_pickle=True)"),
        ("yaml.load(text)", "calls yaml.load"),
        ("subprocess.run(text, shell=True)", "subprocess.run(shell=True)"),
        (
            "AutoModel.from_pretrained(name, trust_remote_code=True)",
            "AutoModel.from_pretrained(trust_remote_code=True)",
        ),
    ],
)
def test_what_could_run_is_found(code: str, found: str) -> None:
    assert found in list(unsafe(code))


def test_every_dependency_has_a_range_and_a_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for dependency in tomllib.loads(text)["project"]["dependencies"]:
        assert re.search(r"[<>=]", dependency), dependency
        assert re.search(rf'"{re.escape(dependency)}", # \w', text), f"{dependency} has no reason behind it"
