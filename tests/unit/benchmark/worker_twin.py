"""A process that behaves as `flashmemory_vllm.cli.bench_worker` does; its job's arguments say how it ends."""

import subprocess
import sys
import time
from pathlib import Path

from flashmemory_vllm.benchmark.process import Event, Job, tell


def main(job_path: Path, events_path: Path) -> None:
    job = Job.read(job_path)
    sys.stdout.write("(EngineCore) INFO it prints here too\n")
    if "refuse" in job.setup.llm:
        raise ValueError(job.setup.llm["refuse"])
    if "refuse_and_hang" in job.setup.llm:
        where = "(EngineCore pid=7) ERROR 11-24 02:32:48 [core.py:1510]"
        sys.stdout.write(f"{where} EngineCore failed to start.\n{where} Traceback (most recent call last):\n")
        sys.stdout.write(f"{where} flashmemory_vllm.errors.ConfigError: {job.setup.llm['refuse_and_hang']}\n")
        sys.stdout.flush()
    if "hang" in job.setup.llm or "refuse_and_hang" in job.setup.llm:
        time.sleep(600)
    tell(events_path, Event("up", 0, {}))
    for place, work in enumerate(job.works):
        tell(events_path, Event("begin", place, {}))
        tell(events_path, Event("figures", place, {"p50_ms": float(sum(work.prompt_lens))}))
    if "linger" in job.setup.llm:
        # As an engine's core may outlive the process that started it
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(job.setup.llm["linger"]).write_text(str(child.pid))
    tell(events_path, Event("done", 0, {}))
    if "hang_at_exit" in job.setup.llm:
        time.sleep(600)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
