"""The process behind `flashmemory bench`: one engine, the loads of one job, an event for each.

`python -m flashmemory_vllm.cli.bench_worker JOB EVENTS`, see `flashmemory_vllm.benchmark.process`.
"""

import os
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType

from flashmemory_vllm.benchmark.measure import Work, measure
from flashmemory_vllm.benchmark.process import Event, Job, tell

# Long enough to be sparse and to be selected for at least once; what it compiles on the way is not measured
WARM_UP = Work(prompt_lens=(4096, 4096), output_tokens=48, slack_tokens=16, streams=2**30)


def main(job_path: Path, events_path: Path) -> None:
    """Start the engine, warm it up, run the loads."""
    from flashmemory_vllm.plugin.bench_engine import BenchEngine

    job = Job.read(job_path)
    engine = BenchEngine(job.setup.llm, job.setup.ours)
    tell(events_path, Event("up", 0, {}))
    sizes = engine.sizes()
    longest = min(max(max(work.prompt_lens) for work in job.works), sizes.max_model_len // 2, *WARM_UP.prompt_lens)
    measure(engine, replace(WARM_UP, prompt_lens=(longest,) * 2))
    for place, work in enumerate(job.works):
        if job.deadline is not None and time.monotonic() > job.deadline:
            break
        needed = work.num_blocks(sizes.block_size)
        if work.must_fit and needed >= sizes.num_blocks:
            reason = f"skipped: needs {needed} KV blocks, the engine has {sizes.num_blocks}"
            tell(events_path, Event("skipped", place, {"error": reason}))
            continue
        tell(events_path, Event("begin", place, {}))
        tell(events_path, Event("figures", place, measure(engine, work) | asdict(sizes)))
    engine.close()
    tell(events_path, Event("done", 0, {}))


def leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say why and be gone at once: Python's own way out waits for threads, and what has failed may never answer."""
    # Where torch names the rank before each line, `sys.stderr` is a buffer that it prints afterwards
    traceback.print_exception(kind, error, trace, file=sys.__stderr__)
    if sys.__stderr__ is not None:
        sys.__stderr__.flush()
    os._exit(1)


if __name__ == "__main__":
    sys.excepthook = leave
    main(Path(sys.argv[1]), Path(sys.argv[2]))
