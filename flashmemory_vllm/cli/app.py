"""The `flashmemory` command: one parser, and the one border that turns our errors into an exit code."""

import argparse
import sys
from collections.abc import Callable, Sequence

from flashmemory_vllm import __version__
from flashmemory_vllm.cli import accuracy, bench, capture, demo, docs, doctor, plan, reference, soak, train
from flashmemory_vllm.cli import eval as evaluate
from flashmemory_vllm.errors import FlashMemoryError
from flashmemory_vllm.processes.interrupts import Interrupted, interruptible

EXIT_USER_ERROR = 2


def build_parser() -> argparse.ArgumentParser:
    """Make the parser; every command sets `run`, which takes the arguments and returns an exit code."""
    parser = argparse.ArgumentParser(prog="flashmemory", description="Virtual memory for vLLM's KV cache.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (plan, doctor, demo, evaluate, accuracy, bench, soak, capture, train, reference, docs):
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None, run: Callable[[argparse.Namespace], int] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name. Default: those of this process.
        run: takes the parsed arguments. Default: what the command itself names.

    Returns:
        The command's exit code, or 2 after an error that the user can mend, told in one line; after a signal that asks
        for an end, 128 and its number, once nothing that the command has started runs any more.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(words, argparse.Namespace(words=words))
    try:
        with interruptible():
            status: int = (run or args.run)(args)
    except FlashMemoryError as error:
        print(f"flashmemory: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Interrupted as interrupted:
        print(f"flashmemory: ended by {interrupted}", file=sys.stderr)
        return interrupted.exit_code
    return status


if __name__ == "__main__":
    sys.exit(main())
