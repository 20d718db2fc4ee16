"""Counters cross processes through files of one writer each; those of dead writers are not read nor kept."""

import subprocess
import sys
from pathlib import Path

import pytest

from flashmemory_vllm.errors import ConfigError, IntegrityError
from flashmemory_vllm.observability.counters import (
    SCHEDULER,
    Capacity,
    CounterReader,
    CounterWriter,
    engine_directory,
    read_capacity,
    worker_name,
)
from flashmemory_vllm.observability.metrics import SERIES, series

WRITER_PROCESS = """
import sys
from pathlib import Path
from flashmemory_vllm.observability.counters import Capacity, CounterWriter
writer = CounterWriter.create(Path(sys.argv[1]), "worker-1")
writer.publish_capacity(Capacity(num_slots=90, num_logical_blocks=1000))
for _ in range(1000):
    writer.add("recalled_blocks_total", 3)
writer.set("slots_used", 7)
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "flashmemory-test-0"


@pytest.fixture
def other_process(directory: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER_PROCESS, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_values_are_summed_over_processes(directory: Path, other_process: "subprocess.Popen[str]") -> None:
    with (
        CounterWriter.create(directory, worker_name(0)) as worker,
        CounterWriter.create(directory, SCHEDULER) as scheduler,
    ):
        worker.add("recalled_blocks_total", 10)
        worker.set("slots_used", 5)
        scheduler.add("refused_admissions_total")
        values = CounterReader(directory).read()
        assert values["recalled_blocks_total"] == 3010
        assert values["slots_used"] == 12
        assert values["refused_admissions_total"] == 1
        other_process.communicate("end\n")


def test_a_process_that_ends_takes_its_file_along(directory: Path, other_process: "subprocess.Popen[str]") -> None:
    other_process.communicate("end\n")
    assert not directory.exists()


def test_the_file_of_a_killed_process_is_not_read(directory: Path, other_process: "subprocess.Popen[str]") -> None:
    other_process.kill()
    other_process.communicate()
    assert list(directory.glob("*.bin"))
    assert CounterReader(directory).read() == {}


def test_a_new_writer_removes_what_a_killed_process_left(
    directory: Path, other_process: "subprocess.Popen[str]"
) -> None:
    other_process.kill()
    other_process.communicate()
    with CounterWriter.create(directory.with_name("flashmemory-other-0"), worker_name(0)):
        assert not directory.exists()


def test_a_new_writer_leaves_the_files_of_living_processes(
    directory: Path, other_process: "subprocess.Popen[str]"
) -> None:
    with CounterWriter.create(directory.with_name("flashmemory-other-0"), worker_name(0)):
        assert CounterReader(directory).read()["slots_used"] == 7
    other_process.communicate("end\n")


def test_capacity_is_the_smallest_over_the_workers(directory: Path, other_process: "subprocess.Popen[str]") -> None:
    with (
        CounterWriter.create(directory, worker_name(0)) as worker,
        CounterWriter.create(directory, SCHEDULER),
    ):
        worker.publish_capacity(Capacity(num_slots=100, num_logical_blocks=800))
        assert read_capacity(directory) == Capacity(num_slots=90, num_logical_blocks=800)
        other_process.communicate("end\n")


def test_capacity_waits_for_every_worker(directory: Path) -> None:
    with (
        CounterWriter.create(directory, worker_name(0)) as first,
        CounterWriter.create(directory, worker_name(1)),
    ):
        first.publish_capacity(Capacity(4, 8))
        with pytest.raises(IntegrityError, match="1 of 2 workers"):
            read_capacity(directory)


def test_resident_ratio_is_the_ratio_of_the_sums(directory: Path) -> None:
    with (
        CounterWriter.create(directory, worker_name(0)) as first,
        CounterWriter.create(directory, worker_name(1)) as second,
    ):
        for worker, resident in ((first, 10), (second, 20)):
            worker.set("resident_blocks", resident)
            worker.set("total_blocks", 100)
        assert CounterReader(directory).read()["resident_ratio"] == pytest.approx(0.15)


def test_without_requests_the_ratio_is_zero(directory: Path) -> None:
    with CounterWriter.create(directory, worker_name(0)):
        assert CounterReader(directory).read() == dict.fromkeys(SERIES, 0.0)


def test_histograms_are_summed_over_processes(directory: Path) -> None:
    with (
        CounterWriter.create(directory, worker_name(0)) as first,
        CounterWriter.create(directory, worker_name(1)) as second,
    ):
        first.observe("block_idle_steps", [2, 0, 1, 0, 0, 0, 0, 0, 0], 20.0)
        first.observe("block_idle_steps", [0, 1, 0, 0, 0, 0, 0, 0, 0], 3.0)
        second.observe("block_idle_steps", [0, 0, 0, 0, 0, 0, 0, 0, 1], 20000.0)
        values = CounterReader(directory).read()
    reached = {
        end: values[f'block_idle_steps_bucket{{le="{end}"}}'] for end in ("1.0", "4.0", "16.0", "16384.0", "+Inf")
    }
    assert reached == {"1.0": 2, "4.0": 3, "16.0": 4, "16384.0": 4, "+Inf": 5}
    assert (values["block_idle_steps_count"], values["block_idle_steps_sum"]) == (5, 20023.0)


@pytest.mark.parametrize("name", ["evictions_total", "no_such_steps"])
def test_only_a_histogram_takes_counts_by_bucket(directory: Path, name: str) -> None:
    with CounterWriter.create(directory, worker_name(0)) as worker, pytest.raises(KeyError):
        worker.observe(name, [1], 1.0)


def test_one_writer_for_each_file(directory: Path) -> None:
    with (
        CounterWriter.create(directory, worker_name(0)),
        pytest.raises(IntegrityError, match="another living process"),
    ):
        CounterWriter.create(directory, worker_name(0))


@pytest.mark.parametrize("name", ["worker", "worker-x", "schedular", "../worker-0"])
def test_other_writer_names_are_refused(directory: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="writer name"):
        CounterWriter.create(directory, name)


def test_a_metric_has_one_source(directory: Path) -> None:
    with CounterWriter.create(directory, SCHEDULER) as scheduler, pytest.raises(KeyError):
        scheduler.add("recalled_blocks_total")


def test_a_file_of_another_version_is_refused(directory: Path) -> None:
    with CounterWriter.create(directory, worker_name(0)) as worker:
        with worker.path.open("r+b") as file:
            file.seek(8)
            file.write(b"another ")
        with pytest.raises(IntegrityError, match="another layout"):
            CounterReader(directory).read()


def test_no_directory_reads_as_nothing(tmp_path: Path) -> None:
    assert CounterReader(tmp_path / "absent").read() == {}


def test_engines_have_directories_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert engine_directory("a", 1) == tmp_path / "flashmemory-a-1"
    assert len({engine_directory("a"), engine_directory("a", 1), engine_directory("b")}) == 3


def test_reasons_have_values_of_their_own(directory: Path) -> None:
    with (
        CounterWriter.create(directory, worker_name(0)),
        CounterWriter.create(directory, SCHEDULER) as scheduler,
    ):
        scheduler.add(series("requests_dense_total", "mode_pressure"), 2)
        scheduler.add(series("requests_dense_total", "ratio_keeps_all"), 3)
        values = CounterReader(directory).read()
        assert values['requests_dense_total{reason="mode_pressure"}'] == 2
        assert values['requests_dense_total{reason="ratio_keeps_all"}'] == 3
        assert values['requests_dense_total{reason="below_min_sparse_tokens"}'] == 0
        with pytest.raises(KeyError):
            scheduler.add("requests_dense_total")
