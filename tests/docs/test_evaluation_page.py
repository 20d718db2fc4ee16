"""The evaluation page names every option of the command, and its commands can be read."""

import argparse
import re
import shlex

import pytest

from flashmemory_vllm.cli.app import build_parser
from tests.docs.pages import DOCS, commands

PAGE = DOCS / "evaluation.md"
COMMANDS = [command.split(" # ")[0] for command in commands(PAGE) if command.startswith("flashmemory ")]


def options() -> set[str]:
    """Long options of the command, as its own help lists them."""
    (subparsers,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    names = {name for action in subparsers.choices["eval"]._actions for name in action.option_strings}
    return {name for name in names if name.startswith("--")} - {"--help"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_is_read(command: str) -> None:
    _, name, *arguments = shlex.split(command)
    assert name == "eval"
    build_parser().parse_args([name, *arguments])


def test_the_table_has_every_option() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `--"))
    assert set(re.findall(r"--[a-z-]+", table)) == options()
