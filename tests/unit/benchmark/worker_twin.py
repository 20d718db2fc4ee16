"""A process that behaves as `flashmemory_vllm.cli.bench_worker` does; its job's arguments say how it ends."""

import subprocess
import sys
from pathlib import Path

from flashmemory_vllm.benchmark.process import Event, Job, tell


def main(job_path: Path, events_path: Path) -> None:
    job = Job.read(job_path)
    sys.stdout.write("(EngineCore) INFO it prints here too\n")
    if "refuse" in job.setup.llm:
        raise ValueError(job.setup.llm["refuse"])
    for place, work in enumerate(job.works):
        tell(events_path, Event("begin", place, {}))
        tell(events_path, Event("figures", place, {"p50_ms": float(sum(work.prompt_lens))}))
    if "linger" in job.setup.llm:
        # As an engine's core may outlive the process that started it
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(job.setup.llm["linger"]).write_text(str(child.pid))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
