"""Free host memory under fake /proc and cgroup trees: the tightest limit wins and is named."""

from pathlib import Path

import pytest

from flashmemory_vllm.host_memory import HostMemory, available_host_bytes

GIB = 1 << 30


class Machine:
    """A fake machine with 64 GiB free; cgroups are added by the tests."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        self.cgroups = root / "cgroup"
        self._write(self.proc / "meminfo", f"MemTotal: 1 kB\nMemAvailable:   {64 * GIB // 1024} kB\n")

    def in_cgroup(self, line: str) -> None:
        self._write(self.proc / "self" / "cgroup", line + "\n")

    def v2(self, path: str, limit: int | str, used: int, inactive_file: int = 0) -> None:
        folder = self.cgroups / path
        self._write(folder / "memory.max", f"{limit}\n")
        self._write(folder / "memory.current", f"{used}\n")
        self._write(folder / "memory.stat", f"anon 1\ninactive_file {inactive_file}\n")

    def v1(self, path: str, limit: int, used: int) -> None:
        folder = self.cgroups / "memory" / path
        self._write(folder / "memory.limit_in_bytes", f"{limit}\n")
        self._write(folder / "memory.usage_in_bytes", f"{used}\n")

    def available(self) -> HostMemory:
        return available_host_bytes(self.proc, self.cgroups)

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_cgroups_free_memory_is_the_limit(machine: Machine) -> None:
    assert machine.available() == HostMemory(64 * GIB, "free memory of this machine")


def test_v2_limit_less_what_is_used(machine: Machine) -> None:
    machine.in_cgroup("0::/job")
    machine.v2("job", limit=16 * GIB, used=6 * GIB)
    found = machine.available()
    assert found.bytes == 10 * GIB
    assert found.limited_by.startswith("cgroup v2 limit in ")
    assert found.limited_by.endswith("job/memory.max")


def test_v2_cache_that_the_kernel_gives_up_counts_as_free(machine: Machine) -> None:
    machine.in_cgroup("0::/job")
    machine.v2("job", limit=16 * GIB, used=6 * GIB, inactive_file=2 * GIB)
    assert machine.available().bytes == 12 * GIB


def test_v2_the_tightest_of_nested_limits_wins(machine: Machine) -> None:
    machine.in_cgroup("0::/pod/container")
    machine.v2("pod", limit=8 * GIB, used=5 * GIB)
    machine.v2("pod/container", limit="max", used=1 * GIB)
    assert machine.available().bytes == 3 * GIB


def test_v2_in_a_container_that_sees_only_its_own_cgroup(machine: Machine) -> None:
    machine.in_cgroup("0::/kubepods/pod1/abc")
    machine.v2("", limit=4 * GIB, used=1 * GIB)
    assert machine.available().bytes == 3 * GIB


def test_v1_limit_less_what_is_used(machine: Machine) -> None:
    machine.in_cgroup("4:cpu,memory:/job\n0::/")
    machine.v1("job", limit=12 * GIB, used=2 * GIB)
    found = machine.available()
    assert (found.bytes, found.limited_by.split(" in ")[0]) == (10 * GIB, "cgroup v1 limit")


def test_v1_no_limit_is_a_huge_number(machine: Machine) -> None:
    machine.in_cgroup("4:memory:/")
    machine.v1("", limit=0x7FFFFFFFFFFFF000, used=2 * GIB)
    assert machine.available().limited_by == "free memory of this machine"


def test_more_used_than_allowed_leaves_nothing(machine: Machine) -> None:
    machine.in_cgroup("0::/job")
    machine.v2("job", limit=1 * GIB, used=2 * GIB)
    assert machine.available().bytes == 0


def test_this_machine_can_be_read() -> None:
    assert available_host_bytes().bytes > 0
