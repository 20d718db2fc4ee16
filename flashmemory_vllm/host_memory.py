"""How much host memory this process may still take.

RLIMIT_MEMLOCK plays no part: it limits `mlock`, while CUDA pins pages in its driver, which does not ask.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KIB = 1024
# cgroup v1 reports "no limit" as the largest page-aligned count
_NO_LIMIT_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory that is left.

    Attributes:
        bytes: what may still be taken.
        limited_by: what sets that limit, to name in messages.
    """

    bytes: int
    limited_by: str


def available_host_bytes(proc: Path = Path("/proc"), cgroup_root: Path = Path("/sys/fs/cgroup")) -> HostMemory:
    """How much host memory is left under the tightest of all limits.

    Args:
        proc: root of procfs.
        cgroup_root: where cgroups are mounted.

    Returns:
        The smallest of the machine's free memory and what each cgroup around this process leaves.
    """
    free = HostMemory(_available_bytes(proc / "meminfo"), "free memory of this machine")
    return min([free, *_cgroup_rest(proc, cgroup_root)], key=lambda candidate: candidate.bytes)


def _available_bytes(meminfo: Path) -> int:
    fields = dict(line.split(":", 1) for line in _lines(meminfo))
    return int(fields["MemAvailable"].split()[0]) * KIB


def _cgroup_rest(proc: Path, root: Path) -> Iterator[HostMemory]:
    """What each cgroup from this process's own up to the root leaves."""
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _climb(root, path, limit_name="memory.max", usage_name="memory.current", version="v2")
            # Where v1 and v2 are mounted side by side, v2 lives one level down
            unified = root / "unified"
            yield from _climb(unified, path, limit_name="memory.max", usage_name="memory.current", version="v2")
        elif "memory" in controllers.split(","):
            yield from _climb(
                root / "memory",
                path,
                limit_name="memory.limit_in_bytes",
                usage_name="memory.usage_in_bytes",
                version="v1",
            )


def _climb(root: Path, path: str, *, limit_name: str, usage_name: str, version: str) -> Iterator[HostMemory]:
    """Yield the rest of each limit between a cgroup and the root, both included.

    Inside a container the path may be the host's while the mount shows only the container's own cgroup: what
    does not exist below the root is skipped, and the root itself then is that cgroup.
    """
    own = root / path.lstrip("/")
    for folder in [own, *own.parents]:
        if not folder.is_relative_to(root):
            return
        limit = _read_limit(folder / limit_name)
        if limit is not None:
            used = int((folder / usage_name).read_text()) - _reclaimable_bytes(folder)
            yield HostMemory(max(0, limit - max(0, used)), f"cgroup {version} limit in {folder / limit_name}")


def _read_limit(path: Path) -> int | None:
    """Bytes that a cgroup allows, None when it sets no limit or does not exist."""
    lines = _lines(path)
    if not lines or lines[0] == "max" or int(lines[0]) >= _NO_LIMIT_BYTES:
        return None
    return int(lines[0])


def _reclaimable_bytes(folder: Path) -> int:
    """File cache that the kernel gives up before it refuses memory."""
    stat = dict(line.split() for line in _lines(folder / "memory.stat"))
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
