"""The rows of a soak: what each cell came to, and what it shows to be wrong."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.files import write_json

# An idle process may have grown by this much between two points: allocators keep what they may need again
RSS_SLACK_MIB = 24.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakRow:
    """One engine under load. In the file `is_async` is called `async`.

    Attributes:
        phase: dense (every text compared) or sparse (answers judged).
        runner: v1 or v2, vLLM's model runner.
        is_async: steps were scheduled ahead.
        model: what was served.
        dtype: of model and KV cache.
        ratio: resident ratio.
        selector: what chose blocks; full in the dense phase.
        requests: requests that arrived.
        seconds: how long that took, the wait for the last of them included.
        steps: engine steps.
        texts: finished texts; a request can have several.
        tokens: their tokens, of the dense phase.
        token_differences: tokens that dense attention would not have chosen, None in the sparse phase.
        identical: texts that are token for token what dense attention wrote at its own batching.
        largest_deficit: of the tokens of other texts, the most that one is below the likeliest, read in float32.
        control_deficit: the same of what vLLM's own backend wrote for the same prompts.
        tolerance: what `largest_deficit` may be, where rounding depends on the batch, see `soak.judge`.
        answers_right: share of texts that are the right answer, of the sparse phase.
        floor: what `answers_right` has to be.
        leaked_slots: slots that the idle engine has pinned or reserved at the end.
        leaked_blocks: blocks of vLLM's pool that the idle engine has not got back.
        leaked_entries: places in our objects that still name a request.
        hangs: requests without a token for too long, and steps that did not return.
        overcommit: blocks of running and cached requests on the host for each slot of the device, at the most.
        slots: device slots.
        logical_blocks: blocks that the host can hold.
        finished: requests that got all their answers.
        aborted: requests whose client went away.
        preemptions: requests preempted, like the following as counted by the engine.
        evictions: blocks that gave up a slot.
        recalls: blocks copied from host to device.
        prefetches: those of them that came in while decode went on.
        streamed: blocks read from the host by prefill.
        selections: resident sets chosen anew.
        prefix_hit_tokens: prompt tokens found in the prefix cache.
        running: most requests that ran at once.
        rss_mib_start: memory of the process when it was idle after four fifths of the requests, host pool included.
        rss_mib_end: the same at the end.
        device_mib_start: device memory that torch has given out, at the same points.
        device_mib_end: see there.
        pinned_mib_start: pinned memory that torch has given out, beside the host pool.
        pinned_mib_end: see there.
        cuda_graphs: vLLM's mode of them.
        seed: of the trace.
        error: why the engine or its judge failed, None if they did not.
        command: see `Provenance`, as are commit, gpu and versions.
        commit: commit of the checkout.
        gpu: name of the device.
        versions: version by distribution.
    """

    phase: str
    runner: str
    is_async: bool
    model: str
    dtype: str
    ratio: float
    selector: str
    requests: int
    seconds: float
    steps: int
    texts: int
    tokens: int | None
    token_differences: int | None
    identical: int | None
    largest_deficit: float | None
    control_deficit: float | None
    tolerance: float | None
    answers_right: float | None
    floor: float | None
    leaked_slots: int | None
    leaked_blocks: int | None
    leaked_entries: int | None
    hangs: int
    overcommit: float | None
    slots: int
    logical_blocks: int
    finished: int
    aborted: int
    preemptions: int | None
    evictions: int | None
    recalls: int | None
    prefetches: int | None
    streamed: int | None
    selections: int | None
    prefix_hit_tokens: int | None
    running: int | None
    rss_mib_start: float | None
    rss_mib_end: float | None
    device_mib_start: float | None
    device_mib_end: float | None
    pinned_mib_start: float | None
    pinned_mib_end: float | None
    cuda_graphs: str | None
    seed: int
    error: str | None
    command: str
    commit: str
    gpu: str
    versions: dict[str, str]

    def problems(self) -> list[str]:
        """What this row shows to be wrong, with the engine or with the soak."""
        is_right = {
            self.error or "": self.error is None,
            f"{self.token_differences} tokens differ": not self.token_differences,
            f"{self.answers_right} of the answers are right, {self.floor} are expected": (
                self.answers_right is None or self.floor is None or self.answers_right >= self.floor
            ),
            "no text was compared": self.texts > 0 and (self.phase == "sparse" or self.token_differences is not None),
            f"{self.leaked_slots} slots leaked": self.leaked_slots == 0,
            f"{self.leaked_blocks} blocks leaked": self.leaked_blocks == 0,
            f"{self.leaked_entries} entries of requests that are gone": self.leaked_entries == 0,
            f"{self.hangs} hangs": self.hangs == 0,
            "requests are lost": self.finished + self.aborted + self.hangs == self.requests,
            **self._memory(),
            **{f"no {name}": value != 0 for name, value in self._events().items()},
        }
        return [problem for problem, is_fine in is_right.items() if not is_fine]

    def _memory(self) -> dict[str, bool]:
        return {
            f"{name} memory grew from {start} to {end} MiB": start is None or end is None or end <= start + slack
            for name, start, end, slack in (
                ("process", self.rss_mib_start, self.rss_mib_end, RSS_SLACK_MIB),
                ("device", self.device_mib_start, self.device_mib_end, 0.0),
                ("pinned", self.pinned_mib_start, self.pinned_mib_end, 0.0),
            )
        }

    def _events(self) -> dict[str, float | None]:
        """What has to have happened for the soak to have been one."""
        return {
            "evictions": self.evictions,
            "recalls": self.recalls,
            "prefix hits": self.prefix_hit_tokens,
            "aborts": self.aborted,
            # A dense request is admitted with slots for all its blocks, so none of them is streamed
            **(
                {"preemptions": self.preemptions}
                if self.phase == "dense"
                else {"selections": self.selections, "streamed blocks": self.streamed}
            ),
        }


def load_rows(path: Path) -> list[SoakRow]:
    """Read the rows of a file; none if it does not exist.

    Raises:
        ConfigError: the file holds something else.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [SoakRow(**{"is_async" if name == "async" else name: row[name] for name in row}) for row in rows]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"--out {path} does not hold rows of a soak: {error}") from None


def save_rows(path: Path, rows: Sequence[SoakRow]) -> None:
    """Write the rows so that an interrupted run leaves either the old file or the new one.

    Raises:
        StorageError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told = [{_file_name(field.name): getattr(row, field.name) for field in fields(row)} for row in rows]
    write_json(path, told)


def _file_name(name: str) -> str:
    return "async" if name == "is_async" else name
