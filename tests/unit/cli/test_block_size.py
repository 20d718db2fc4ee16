"""Commands that start an engine take blocks that the attention of the machine can serve."""

import argparse

import pytest

from flashmemory_vllm.cli import block_size
from flashmemory_vllm.cli.app import build_parser
from flashmemory_vllm.cli.block_size import block_size_of
from flashmemory_vllm.errors import ConfigError

COMMANDS = (["accuracy", "--out", "rows.json"], ["capture", "--out", "data"])


def chosen(command: list[str], *given: str) -> int:
    return block_size_of(build_parser().parse_args([*command, *given]))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(("has_cuda", "default", "allowed"), [(True, 16, [1, 16, 24]), (False, 32, [32, 96])])
def test_what_is_not_given_fits_the_machine(
    command: list[str], has_cuda: bool, default: int, allowed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_size, "_has_cuda", lambda: has_cuda)
    assert chosen(command) == default
    assert [chosen(command, "--block-size", str(size)) for size in allowed] == allowed


@pytest.mark.parametrize(("has_cuda", "given", "said"), [(True, 0, "1 or more"), (False, 16, "multiples of 32")])
def test_what_cannot_be_served_is_refused(
    has_cuda: bool, given: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_size, "_has_cuda", lambda: has_cuda)
    with pytest.raises(ConfigError, match=f"--block-size is {given}: allowed .*{said}"):
        block_size_of(argparse.Namespace(block_size=given))
