"""The process behind `test_fork.py`: makes configurations as `vllm.LLM` does, and forks after each of them."""

import json
import os
import signal
import sys
import time
from typing import Any

HANGS_AFTER_SECONDS = 60.0


def main() -> None:
    """Read engine arguments by name as JSON from standard input; print what each of them leaves behind."""
    import torch
    from vllm import EngineArgs

    import flashmemory_vllm

    flashmemory_vllm.register()
    cases: dict[str, dict[str, Any]] = json.load(sys.stdin)
    found = {}
    for name, arguments in cases.items():
        EngineArgs(**arguments).create_engine_config()
        found[name] = {"forks": _child_ends(), "cuda": bool(torch.cuda.is_initialized())}  # type: ignore[no-untyped-call]
    sys.stdout.write(f"\n{json.dumps(found)}\n")


def _child_ends() -> bool:
    """Whether a child of this process can compute on several threads: it cannot if this process has started any."""
    import torch

    child = os.fork()
    if child == 0:
        torch.randn(4_000_000).sum()
        os._exit(0)
    deadline = time.monotonic() + HANGS_AFTER_SECONDS
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


if __name__ == "__main__":
    main()
