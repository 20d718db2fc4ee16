"""Checks of the host, on trees of files like those of /proc and /sys."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmemory_vllm.doctor.finding import GIB
from flashmemory_vllm.doctor.host import host_memory, lock_limit, numa, parse_ids, shared_memory

GPU = {"GPU 0": "0000:4e:00.0"}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A machine with 64 GiB free, this process in the cgroup `/job` of v1 and of v2."""
    write(tmp_path / "proc" / "meminfo", f"MemAvailable: {64 * GIB // 1024} kB\n")
    write(tmp_path / "proc" / "self" / "cgroup", "4:memory:/job\n0::/job\n")
    return tmp_path / "proc"


def limit_v1(root: Path, num_bytes: int) -> None:
    write(root / "memory" / "job" / "memory.limit_in_bytes", f"{num_bytes}\n")
    write(root / "memory" / "job" / "memory.usage_in_bytes", "0\n")


def limit_v2(root: Path, num_bytes: int) -> None:
    write(root / "job" / "memory.max", f"{num_bytes}\n")
    write(root / "job" / "memory.current", "0\n")


def test_host_memory_without_a_cgroup_limit(proc: Path, tmp_path: Path) -> None:
    finding = host_memory(16 * GIB, proc, tmp_path / "cgroup")
    assert (finding.status, finding.found) == ("ok", "64.0 GiB left (limited by free memory of this machine)")


@pytest.mark.parametrize(("limit", "version"), [(limit_v1, "v1"), (limit_v2, "v2")], ids=["v1", "v2"])
def test_a_cgroup_that_allows_less_than_the_device_has_is_named(
    limit: Callable[[Path, int], None], version: str, proc: Path, tmp_path: Path
) -> None:
    limit(tmp_path / "cgroup", 32 * GIB)
    finding = host_memory(80 * GIB, proc, tmp_path / "cgroup")
    assert finding.status == "warn"
    assert finding.found.startswith(f"32.0 GiB left (limited by cgroup {version} limit in ")
    assert finding.found.endswith("less than 80.0 GiB gains little")
    assert finding.remedy


def test_even_without_a_device_there_is_a_least(proc: Path, tmp_path: Path) -> None:
    limit_v2(tmp_path / "cgroup", 1 * GIB)
    assert host_memory(0, proc, tmp_path / "cgroup").status == "warn"


def test_shared_memory_of_this_machine(tmp_path: Path) -> None:
    assert "GiB free in" in shared_memory(tmp_path).found
    missing = shared_memory(tmp_path / "none")
    assert (missing.status, missing.found) == ("fail", f"{tmp_path / 'none'} does not exist")


@pytest.mark.parametrize(("free", "status"), [(64 << 20, "warn"), (2 * GIB, "ok")])
def test_a_containers_default_shared_memory_is_too_small(
    free: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: type("Usage", (), {"free": free}))
    assert shared_memory(tmp_path).status == status


def test_lock_limit_is_told_but_fails_nothing() -> None:
    assert lock_limit(-1).found == "unlimited"
    assert lock_limit(8 << 20).found.startswith("8 MiB")
    assert lock_limit().status == "ok"


class Sysfs:
    """Nodes 0 with CPUs 0 to 3 and 1 with CPUs 4 to 7, and one GPU."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.node(0, "0-3")
        self.node(1, "4-7")

    def node(self, index: int, cpus: str) -> None:
        write(self.root / "devices" / "system" / "node" / f"node{index}" / "cpulist", f"{cpus}\n")

    def gpu_next_to(self, node: int) -> None:
        write(self.root / "bus" / "pci" / "devices" / GPU["GPU 0"] / "numa_node", f"{node}\n")


@pytest.mark.parametrize(("cpus", "status"), [({4, 5}, "ok"), ({0, 1}, "warn"), (set(range(8)), "warn")])
def test_a_process_beside_the_gpus_node_is_told(cpus: set[int], status: str, tmp_path: Path) -> None:
    sysfs = Sysfs(tmp_path)
    sysfs.gpu_next_to(1)
    (finding,) = numa(GPU, cpus, tmp_path)
    assert finding.status == status
    assert ("--membind=1" in finding.remedy) == (status == "warn")


@pytest.mark.parametrize("node", [-1, None])
def test_a_gpu_whose_node_nobody_knows_is_no_problem(node: int | None, tmp_path: Path) -> None:
    sysfs = Sysfs(tmp_path)
    if node is not None:
        sysfs.gpu_next_to(node)
    (finding,) = numa(GPU, {0}, tmp_path)
    assert finding.status == "ok"


def test_this_machine_has_no_finding_without_a_gpu() -> None:
    assert list(numa({})) == []


@given(st.sets(st.integers(0, 300)))
def test_ids_survive_the_kernels_list_format(ids: set[int]) -> None:
    ranges: list[list[int]] = []
    for one in sorted(ids):
        if ranges and one == ranges[-1][1] + 1:
            ranges[-1][1] = one
        else:
            ranges.append([one, one])
    text = ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)
    assert parse_ids(text + "\n") == ids
