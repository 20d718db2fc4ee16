"""The command line: one border turns domain errors into exit code 2 and one line."""

import argparse
from importlib.metadata import entry_points

import pytest

from flashmemory_vllm import __version__
from flashmemory_vllm.cli import app, docs
from flashmemory_vllm.errors import ConfigError, IntegrityError, StorageError


@pytest.mark.parametrize(
    "error",
    [ConfigError("x is 3: allowed is 4"), IntegrityError("used 3, free 4"), StorageError("a.json: cannot be written")],
)
def test_a_domain_error_is_one_line_and_exit_code_2(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: argparse.Namespace) -> int:  # noqa: ARG001 - a command's signature
        raise error

    monkeypatch.setattr(docs, "run", fail)
    assert app.main(["docs"]) == 2
    assert capsys.readouterr().err == f"flashmemory: {error}\n"


def test_our_own_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: argparse.Namespace) -> int:  # noqa: ARG001 - a command's signature
        raise AssertionError("a bug")

    monkeypatch.setattr(docs, "run", fail)
    with pytest.raises(AssertionError, match="a bug"):
        app.main(["docs"])


def test_the_exit_code_of_a_command_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "run", lambda args: 1 if args.check else 0)
    assert (app.main(["docs", "--check"]), app.main(["docs"])) == (1, 0)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app.main(["--version"])
    assert (ended.value.code, capsys.readouterr().out.strip()) == (0, __version__)


def test_reference_path_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["reference", "path"]) == 0
    assert capsys.readouterr().out.strip().endswith("reference/model")


def test_installed_entry_points_exist() -> None:
    groups = (
        "console_scripts",
        *(f"vllm.{kind}_plugins" for kind in ("general", "platform", "stat_logger", "endpoint")),
    )
    for group in groups:
        (ours,) = entry_points(group=group, name="flashmemory")
        assert callable(ours.load())
