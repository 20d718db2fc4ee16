"""Checks of the host: memory that may be taken, shared memory, the lock limit and the NUMA nodes."""

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from flashmemory_vllm.doctor.finding import GIB, Finding
from flashmemory_vllm.host_memory import available_host_bytes

MIB = 1 << 20
# Half of it is the pool: less holds a few requests of a small model
SMALLEST_HOST_BYTES = 4 * GIB
# vLLM's workers pass their messages through it; 64 MiB is what a container gets by default
SMALLEST_SHM_BYTES = 1 * GIB


def host_memory(
    device_bytes: int = 0, proc: Path = Path("/proc"), cgroup_root: Path = Path("/sys/fs/cgroup")
) -> Finding:
    """How much memory the host pool may take, under the tightest of the machine's and all cgroups' limits.

    Args:
        device_bytes: memory of all devices; a pool that is smaller than that gains little.
        proc: root of procfs.
        cgroup_root: where cgroups are mounted, v1 or v2.
    """
    left = available_host_bytes(proc, cgroup_root)
    found = f"{left.bytes / GIB:.1f} GiB left (limited by {left.limited_by})"
    wanted = max(SMALLEST_HOST_BYTES, device_bytes)
    if left.bytes >= wanted:
        return Finding("host memory", "ok", found)
    return Finding(
        "host memory",
        "warn",
        f"{found}; less than {wanted / GIB:.1f} GiB gains little",
        "raise that limit or free memory; the host pool takes half of what is left unless host_memory_gib is given",
    )


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:  # noqa: S108 - only its size is read
    """How much shared memory vLLM's processes have for their messages.

    Args:
        folder: where it is mounted.
    """
    if not folder.is_dir():
        return Finding("shared memory", "fail", f"{folder} does not exist", f"mount a tmpfs on {folder}")
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.2f} GiB free in {folder}"
    if free < SMALLEST_SHM_BYTES:
        remedy = "give the container more: --ipc=host or --shm-size 8g, in Kubernetes an emptyDir of medium Memory"
        return Finding("shared memory", "warn", found, remedy)
    return Finding("shared memory", "ok", found)


def lock_limit(limit_bytes: int | None = None) -> Finding:
    """The limit on locked memory, which CUDA does not ask when it pins; other software may.

    Args:
        limit_bytes: the soft limit, negative for none. Default: this process's RLIMIT_MEMLOCK.
    """
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit_bytes is None else limit_bytes
    if soft == resource.RLIM_INFINITY:
        return Finding("memlock limit", "ok", "unlimited")
    found = f"{soft / MIB:.0f} MiB; CUDA pins in its driver, which does not ask it"
    return Finding("memlock limit", "ok", found)


def numa(
    gpus: dict[str, str],
    cpus: set[int] | None = None,
    sys_root: Path = Path("/sys"),
) -> Iterator[Finding]:
    """Whether this process runs on the NUMA node of each GPU; a pool on another one is reached more slowly.

    Args:
        gpus: PCI address by name of the GPU, the address as in sysfs: `0000:4e:00.0`.
        cpus: CPUs this process may run on. Default: its affinity.
        sys_root: root of sysfs.
    """
    nodes = {int(path.name.removeprefix("node")): path for path in sys_root.glob("devices/system/node/node[0-9]*")}
    allowed = os.sched_getaffinity(0) if cpus is None else cpus
    for name, address in gpus.items():
        node = _gpu_node(sys_root, address)
        if len(nodes) < 2 or node not in nodes:
            yield Finding(f"NUMA of {name}", "ok", f"{address} is next to no node in particular")
        elif allowed <= parse_ids((nodes[node] / "cpulist").read_text()):
            yield Finding(f"NUMA of {name}", "ok", f"node {node} of {len(nodes)}, where this process runs")
        else:
            yield Finding(
                f"NUMA of {name}",
                "warn",
                f"node {node} of {len(nodes)}, this process may run on others",
                f"vllm serve --numa-bind, or numactl --cpunodebind={node} --membind={node}",
            )


def parse_ids(text: str) -> set[int]:
    """Read the kernel's lists, such as `0-3,8,10-11`."""
    ids: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        ids.update(range(int(first), int(last or first) + 1))
    return ids


def _gpu_node(sys_root: Path, address: str) -> int | None:
    path = sys_root / "bus" / "pci" / "devices" / address / "numa_node"
    return int(path.read_text()) if path.is_file() else None
