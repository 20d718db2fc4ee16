"""The processes of a soak: one serves the trace, the other one judges the texts; files in a folder between them."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from flashmemory_vllm.files import append_text, write_json
from flashmemory_vllm.processes.engine_log import find_error
from flashmemory_vllm.processes.guarded import GuardedProcess
from flashmemory_vllm.soak.drive import Text
from flashmemory_vllm.soak.settings import Device, SoakSettings
from flashmemory_vllm.soak.trace import Trace

WORKER_MODULE = "flashmemory_vllm.cli.soak_worker"
# What Python's faulthandler begins its report with when a process has waited for too long
HANG_MARK = "Timeout ("
CACHED_PRODUCTS = 8
Task = Literal["serve", "judge"]
Document = Literal["job", "outcome", "verdict"]


@dataclass(frozen=True, slots=True)
class Job:
    """What both processes need beside the trace.

    Attributes:
        model: folder of the model.
        indexer: trained indexer of the sparse phase, or None.
        seconds: no request arrives later than this, or None.
        memory_gib: device memory for KV of the reference, which has to hold all that runs at once.
        device: where the engines run.
    """

    model: str
    indexer: str | None
    seconds: float | None
    memory_gib: float
    device: Device


class SoakFolder:
    """Where the processes of one cell leave what they have.

    Args:
        path: the folder; created.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.trace = path / "trace.json"
        self.log = path / "log.txt"
        self._texts = path / "texts.jsonl"

    def begin(self, trace: Trace) -> None:
        """Keep what is to be played, and nothing of a soak that was kept here before: it would be judged again.

        Raises:
            StorageError: the disk is full.
        """
        for path in (*map(self._document, get_args(Document)), self.log, self._texts):
            path.unlink(missing_ok=True)
        trace.save(self.trace)

    def write(self, name: Document, fields: Mapping[str, Any]) -> None:
        """Write a document.

        Raises:
            StorageError: the disk is full.
        """
        write_json(self._document(name), dict(fields), indent=None)

    def read(self, name: Document) -> dict[str, Any] | None:
        """A document, or None if the process that was to write it has not come so far."""
        path = self._document(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def keep(self, text: Text) -> None:
        """Append a finished text.

        Raises:
            StorageError: the disk is full; the texts before it can be read.
        """
        append_text(self._texts, json.dumps(asdict(text)) + "\n")

    def texts(self) -> list[Text]:
        """All finished texts."""
        return list(self._read_texts())

    def _document(self, name: Document) -> Path:
        return self.path / f"{name}.json"

    def _read_texts(self) -> Iterator[Text]:
        if not self._texts.exists():
            return
        with self._texts.open(encoding="utf-8") as file:
            for line in file:
                fields = json.loads(line)
                yield Text(fields["name"], fields["place"], tuple(fields["token_ids"]))


def worker_environment(settings: SoakSettings, device: Device, task: Task, triton: Path | None) -> dict[str, str]:
    """Variables of a worker's process.

    Args:
        settings: of the cell.
        device: "cpu" or "cuda".
        task: what the process does.
        triton: folder of a stand-in for Triton's CPU backend; model runner V2 needs one without CUDA.
    """
    serves_v2 = settings.runner == "v2" and (task == "serve" or device == "cuda")
    env = dict(os.environ) | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if serves_v2 else "0",
        # The reference is vLLM as it is
        "VLLM_PLUGINS": "flashmemory" if task == "serve" else "",
    }
    if device == "cpu":
        # Threads that wait for each other spin: on cores shared with anything else, a small model is faster with one
        env |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        # oneDNN keeps 0.3 MiB for each shape of a product, 1,024 of them: a leak would not be seen beside that
        env["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = str(CACHED_PRODUCTS)
        env.pop("TRITON_INTERPRET", None)
        if serves_v2:
            paths = [str(triton or ""), env.get("PYTHONPATH", "")]
            env |= {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    return env


def run_worker(folder: SoakFolder, task: Task, env: Mapping[str, str]) -> str | None:
    """Run one of the processes to its end; it never outlives this call.

    Returns:
        None, or why it failed; after a hang with the place where each thread was.
    """
    command = [sys.executable, "-m", WORKER_MODULE, str(folder.path), task]
    with folder.log.open("ab") as log, GuardedProcess(command, log, env) as process:
        status = process.wait()
    if status == 0:
        return None
    printed = folder.log.read_text(encoding="utf-8", errors="replace")
    if HANG_MARK in printed:
        return f"{task}: a step did not return\n" + printed[printed.rindex(HANG_MARK) :]
    return f"{task}: {find_error(printed) or f'exit code {status}'}"
