"""The process behind `flashmemory accuracy`: one engine and the cells that are measured on it.

`python -m flashmemory_vllm.cli.accuracy_worker JOB ERROR`, see `flashmemory_vllm.cli.accuracy_starts`.
"""

import sys
from contextlib import AbstractContextManager
from pathlib import Path

from flashmemory_vllm.cli.accuracy_starts import Job, write_error
from flashmemory_vllm.errors import FlashMemoryError
from flashmemory_vllm.evaluation import vocabulary
from flashmemory_vllm.evaluation.accuracy import AccuracyRun, Generator
from flashmemory_vllm.evaluation.accuracy_plan import ORACLE
from flashmemory_vllm.evaluation.provenance import Provenance


def main(job_path: Path, error_path: Path) -> None:
    """Start the engine and measure; an error that the user can mend is told in a file."""
    job = Job.read(job_path)
    try:
        with _generator(job) as generator:
            provenance = Provenance.collect(job.command, job.commit)
            AccuracyRun(generator, job.conditions, provenance, job.path, job.deadline).run(job.start.cells)
    except FlashMemoryError as error:
        write_error(error_path, error)


def _generator(job: Job) -> AbstractContextManager[Generator]:
    from flashmemory_vllm.plugin.capture import OracleGenerator
    from flashmemory_vllm.plugin.offline import OfflineGenerator
    from flashmemory_vllm.plugin.recorded_prompts import RecordedPrompts

    engine, options, stop = job.start.engine, job.start.options, (vocabulary.END,)
    if any(cell.setting.selector == ORACLE for cell in job.start.cells):
        future = RecordedPrompts.load_all(job.oracle_data)
        return OracleGenerator(future, str(job.model), engine, options, stop)
    return OfflineGenerator(str(job.model), engine, options, stop)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
