"""A process that watches its ancestors ends with them, though it hangs and hears no SIGTERM."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.unit.processes.test_guarded import PATIENCE_SECONDS, assert_gone, wait_until

# Three generations; the youngest watches both others and hears no SIGTERM
GENERATION = """
import os, signal, subprocess, sys, time
from pathlib import Path
from flashmemory_vllm.processes.parents import end_with
depth, folder = int(sys.argv[1]), Path(sys.argv[2])
if depth == 0:
    signal.signal(signal.SIGTERM, lambda *_: (folder / "told").touch())
    parent = os.getppid()
    chain = [parent, int((folder / "2").read_text())]
    end_with(chain, (folder / "reason").write_text, grace_seconds=0.5)
(folder / f"{depth}.new").write_text(str(os.getpid()))
(folder / f"{depth}.new").rename(folder / str(depth))
if depth:
    subprocess.Popen([sys.executable, *sys.orig_argv[1:3], str(depth - 1), str(folder)])
while True:
    time.sleep(6000)
"""


@pytest.mark.parametrize("killed", [1, 2], ids=["parent", "grandparent"])
def test_it_ends_with_any_of_its_ancestors(tmp_path: Path, killed: int) -> None:
    oldest = subprocess.Popen([sys.executable, "-c", GENERATION, "2", str(tmp_path)])
    try:
        wait_until(lambda: all((tmp_path / str(depth)).exists() for depth in range(3)), "three generations")
        pids = [int((tmp_path / str(depth)).read_text()) for depth in range(3)]
        psutil.Process(pids[killed]).kill()
        if killed == 2:
            oldest.wait(PATIENCE_SECONDS)
        assert_gone(pids[:1])
        assert (tmp_path / "told").exists()
        assert str(pids[killed]) in (tmp_path / "reason").read_text()
    finally:
        for depth in range(3):
            if (tmp_path / str(depth)).exists():
                subprocess.run(["/bin/kill", "-9", (tmp_path / str(depth)).read_text()], check=False)
        oldest.wait(PATIENCE_SECONDS)
