"""A process that behaves as `flashmemory_vllm.cli.accuracy_worker` does; its job's command says how it ends."""

import sys
from pathlib import Path

from flashmemory_vllm.cli.accuracy_starts import Job, write_error
from flashmemory_vllm.errors import ConfigError, IntegrityError


def main(job_path: Path, error_path: Path) -> None:
    job = Job.read(job_path)
    match job.command:
        case ["refuse", length]:
            write_error(error_path, ConfigError("x" * int(length)))
        case ["break"]:
            write_error(error_path, IntegrityError("used 3, free 4"))
        case ["die", code]:
            sys.exit(int(code))
        case _:
            Path(job.path).write_text(repr(job))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
