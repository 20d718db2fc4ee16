"""The processes behind `flashmemory soak`: `python -m flashmemory_vllm.cli.soak_worker FOLDER serve|judge`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashmemory_vllm.cli.bench_worker import leave
from flashmemory_vllm.soak.adapter import write_adapter
from flashmemory_vllm.soak.drive import Driver
from flashmemory_vllm.soak.judge import TOLERANCES, compare, weigh
from flashmemory_vllm.soak.process import Job, SoakFolder
from flashmemory_vllm.soak.reader import TextReader
from flashmemory_vllm.soak.trace import Trace

GIB = 1 << 30
# Of a GPU, where several engines share it
GPU_SHARE = 0.2


def main(path: Path, task: str) -> None:
    """Serve the trace of the folder, or compare its texts with dense attention's."""
    folder = SoakFolder(path)
    job = Job(**(folder.read("job") or {}))
    trace = Trace.load(folder.trace)
    count = trace.settings.adapters if trace.settings.phase == "dense" else 0
    adapters = [write_adapter(Path(job.model), path / f"adapter-{seed}", seed) for seed in range(1, count + 1)]
    if task == "serve":
        _serve(folder, job, trace, adapters)
    else:
        _judge(folder, job, trace, adapters)


def _serve(folder: SoakFolder, job: Job, trace: Trace, adapters: list[Path]) -> None:
    from flashmemory_vllm.plugin.soak_engine import ServedEngine

    settings = trace.settings
    options = settings.options | ({} if job.indexer is None else {"indexer": job.indexer})
    arguments = {
        "model": job.model,
        **settings.engine,
        "num_gpu_blocks_override": settings.logical_blocks,
        # More than the slots need: their number is set
        **_memory(job),
    }
    engine = ServedEngine(arguments, options, adapters, is_async=settings.is_async, patience=settings.patience_seconds)
    outcome = Driver(trace, engine, folder.keep, job.seconds).run()
    told = {"counters": engine.counters(), "leaks": engine.leaks(), "machinery": engine.machinery()}
    folder.write("outcome", asdict(outcome) | told)
    engine.close()


def _judge(folder: SoakFolder, job: Job, trace: Trace, adapters: list[Path]) -> None:
    from flashmemory_vllm.plugin.soak_engine import DenseReference

    settings = trace.settings
    arguments = {
        "model": job.model,
        **settings.engine,
        "enforce_eager": True,
        **_memory(job),
    }
    reference = DenseReference(arguments, adapters)
    found = compare(trace, folder.texts(), reference)
    # Two models at once may be more than a device holds
    reference.close()
    reader = TextReader(Path(job.model), adapters, settings.dtype, job.device)
    folder.write("verdict", asdict(weigh(found, reader, TOLERANCES[settings.dtype])))


def _memory(job: Job) -> dict[str, Any]:
    """Memory for KV in bytes; vLLM's share of a GPU sizes nothing then, and has to leave room for other engines."""
    share = {"gpu_memory_utilization": GPU_SHARE} if job.device == "cuda" else {}
    return {"kv_cache_memory_bytes": int(job.memory_gib * GIB), **share}


if __name__ == "__main__":
    sys.excepthook = leave
    main(Path(sys.argv[1]), sys.argv[2])
