"""Ends vLLM's processes when the one that serves with them was killed."""

import multiprocessing
import os

import psutil
from vllm import envs
from vllm.logger import init_logger

from flashmemory_vllm.processes.parents import end_with

# vLLM sets up handlers for the names below its own only.
logger = init_logger("vllm.flashmemory")

# How vLLM names its processes, in Python and in the process table
_ENGINE_CORE, _WORKER = "EngineCore", "VllmWorker"


def hold_on_to_server() -> None:
    """End this worker, and with it its engine core, once the server or the program that started them is gone.

    In vLLM 0.32 a worker with a process of its own watches its engine core, once it has started, and nobody watches
    the server: when that is killed, its engine core stays, with the device's memory and the pinned host pool. Does
    nothing where the engine runs in the user's own process.
    """
    if not multiprocessing.current_process().name.startswith((_ENGINE_CORE, _WORKER)):
        return
    parent = os.getppid()
    ancestors = [parent]
    if _is_engine_core(parent):
        ancestors.append(psutil.Process(parent).ppid())
    end_with(ancestors, logger.error)


def _is_engine_core(pid: int) -> bool:
    title = " ".join(psutil.Process(pid).cmdline())
    return title.startswith(f"{envs.VLLM_PROCESS_NAME_PREFIX}::{_ENGINE_CORE}")
