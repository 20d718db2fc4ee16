"""Records prompts one batch beside the other and writes them in order."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from tqdm import tqdm

from flashmemory_vllm.capture.document import Document, Recording
from flashmemory_vllm.capture.prompts import Prompt
from flashmemory_vllm.capture.writer import CaptureWriter


class RecordingEngine(Protocol):
    """An engine whose requests are recorded."""

    def submit(self, name: str, prompt: Prompt) -> None:
        """Begin a prompt."""

    def finished(self) -> Iterator[tuple[str, list[int], Recording]]:
        """Run one step; names, output ids and recordings of the prompts that it finished."""


def record(engine: RecordingEngine, prompts: Sequence[Prompt], writer: CaptureWriter, every: int, batch: int) -> None:
    """Record what the writer's folder lacks, showing progress, then complete the folder.

    At most `2 * batch` documents are under way or waiting for one before them.

    Args:
        engine: generates and records.
        prompts: all of them, those of complete shards included.
        writer: where to.
        every: output tokens from one recorded token to the next, as the engine records.
        batch: prompts that run at once.
    """
    first = writer.num_documents
    try:
        with tqdm(total=len(prompts), initial=first, unit="document") as progress:
            for document in in_order(engine, prompts, first, every, batch):
                if not writer.add(document.tensors(writer.block_size)):
                    progress.write(f"--max-gib is reached: {writer.num_documents} of {len(prompts)} documents are kept")
                    break
                progress.update()
    finally:
        # Whatever ended it: the next run goes on behind what there is
        writer.flush()
    writer.finish()


def look(engine: RecordingEngine, prompts: Sequence[Prompt]) -> list[Recording]:
    """Recordings of some prompts, all of them at once, in any order."""
    for index, prompt in enumerate(prompts):
        engine.submit(f"first look {index}", prompt)
    found: list[Recording] = []
    while len(found) < len(prompts):
        found += [recording for _, _, recording in engine.finished()]
    return found


def in_order(
    engine: RecordingEngine, prompts: Sequence[Prompt], first: int, every: int, batch: int
) -> Iterator[Document]:
    """Documents from number `first` on, in the order of their prompts whichever ends first."""
    waiting: dict[str, Document] = {}
    submitted = wanted = first
    while wanted < len(prompts):
        while submitted < min(len(prompts), wanted + 2 * batch):
            engine.submit(str(submitted), prompts[submitted])
            submitted += 1
        for name, output_ids, recording in engine.finished():
            waiting[name] = Document(prompts[int(name)], output_ids, recording, every)
        while str(wanted) in waiting:
            yield waiting.pop(str(wanted))
            wanted += 1
