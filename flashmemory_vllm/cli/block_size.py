"""The option `--block-size` of commands that start an engine of their own."""

import argparse
from functools import cache

from flashmemory_vllm.errors import ConfigError

CUDA_DEFAULT = 16
# vLLM's attention on CPUs takes multiples of this and nothing else
CPU_MULTIPLE = 32


def add_block_size(parser: argparse.ArgumentParser) -> None:
    """Add the option; `block_size_of` reads it."""
    parser.add_argument(
        "--block-size",
        type=int,
        help=f"tokens in a KV block. Default: {CUDA_DEFAULT}; without CUDA {CPU_MULTIPLE}, of which it takes multiples",
    )


def block_size_of(args: argparse.Namespace) -> int:
    """Tokens in a KV block: what was given, or what this machine's attention takes.

    Raises:
        ConfigError: this machine cannot serve blocks of the size that was given.
    """
    given: int | None = args.block_size
    if given is not None and given < 1:
        raise ConfigError(f"--block-size is {given}: allowed is 1 or more")
    if _has_cuda():
        return CUDA_DEFAULT if given is None else given
    if given is not None and given % CPU_MULTIPLE:
        raise ConfigError(f"--block-size is {given}: allowed without CUDA are multiples of {CPU_MULTIPLE}")
    return CPU_MULTIPLE if given is None else given


@cache
def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
