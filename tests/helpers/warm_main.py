"""The process behind `tests.helpers.modules`: imports vLLM, then runs each module it is asked for in a fork of itself.

A request is a line of JSON on standard input: `module`, `arguments`, and files for `stdin`, `stdout` and `stderr`. The
answer is a line with the exit code. When standard input ends, so does this.
"""

import importlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

# What every engine imports sooner or later; nothing of it starts a thread or reads what a run is given
HEAVY = (
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "transformers.models.llama.configuration_llama",
)


def main() -> None:
    """Serve requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for name in HEAVY:
        importlib.import_module(name)
    # One of jemalloc's minds a fork by itself
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    started = [name for name in names if not name.startswith("jemalloc")][1:]
    assert not started, f"an import started threads, which a fork does not have: {started}"
    answers.write("ready\n")
    for line in sys.stdin:
        request = json.loads(line)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            answers.close()
            _run(request)
        _, status = os.waitpid(pid, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")


def _run(request: dict[str, Any]) -> None:
    """Be the process that was asked for, to its end."""
    for number, name, flags in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_WRONLY), (2, "stderr", os.O_WRONLY)):
        file = os.open(request[name], flags)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = Path(request["stdin"]).open(encoding="utf-8")  # noqa: SIM115 - as long as the process lasts
    sys.argv = [request["module"], *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
