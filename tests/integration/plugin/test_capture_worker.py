"""What stands before a runtime passes everything on, shows passes as they are, and refuses those it cannot show."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.plugin.capture_worker import RecordedRuntime, TimedRuntime
from flashmemory_vllm.residency.types import NewRequest, RunningRequest, StepInput
from flashmemory_vllm.runtime.tables import CompactedTable

TABLE = torch.arange(12, dtype=torch.int32).view(3, 4)
ROWS = "rows old new, 3 lengths, 31 tokens"


class Runtime:
    """Notes its calls; tables have a row of padding."""

    layer_names = ("a", "b")

    def __init__(self, seq_lens: Sequence[int]) -> None:
        self.calls: list[str] = []
        self.in_step = False
        self._seq_lens = seq_lens

    @contextmanager
    def step(self, step_input: StepInput) -> Iterator[None]:
        self.calls.append(f"begin {step_input.step}")
        self.in_step = True
        yield
        self.in_step = False
        self.calls.append("end")

    def set_batch(self, req_ids: Sequence[str], seq_lens: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        self.calls.append(f"rows {' '.join(req_ids)}, {len(seq_lens)} lengths, {len(slot_mapping)} tokens")

    def compacted_tables(self, num_rows: int) -> list[CompactedTable]:
        self.calls.append(f"tables {num_rows}")
        return [CompactedTable(TABLE, torch.empty(0), torch.tensor([*self._seq_lens, 0]), max(self._seq_lens))]

    def attended(self, layer: int, *_: object) -> None:
        self.calls.append(f"attended {layer}")


class Recorder:
    """Notes what it is shown."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def begin(self, rows: Sequence[Any]) -> None:
        self.seen += [(r.req_id, r.prompt_len, r.num_computed_tokens, r.num_tokens, r.slots.tolist()) for r in rows]

    def layer(self, layer: int, query: torch.Tensor) -> None:
        self.seen.append((layer, len(query)))

    def end(self) -> None:
        self.seen.append("end")


def make_step(**changes: Any) -> StepInput:
    """A request's only chunk beside a decode step of another; batch rows come in the other order."""
    given: dict[str, Any] = {
        "step": 7,
        "finished": (),
        "preempted": (),
        "new": (NewRequest("new", (1, 2), 0, 30),),
        "running": (RunningRequest("old", (), 50),),
        "num_scheduled_tokens": {"new": 30, "old": 1},
    }
    return StepInput(**(given | changes))


def run_step(watched: Any, step_input: StepInput) -> None:
    some = torch.zeros(31, 1, 1)
    with watched.step(step_input):
        watched.set_batch(["old", "new"], torch.tensor([51, 30, 0]), torch.zeros(31))
        watched.compacted_tables(3)
        for layer in range(2):
            watched.attended(layer, some, some, some, some)


def make_recorded(seq_lens: Sequence[int]) -> tuple[Runtime, Any, RecordedRuntime]:
    runtime, recorder = Runtime(seq_lens), Recorder()
    watched = RecordedRuntime(runtime, recorder)  # type: ignore[arg-type]
    with watched.step(make_step(new=(NewRequest("old", (), 0, 40),), running=(), num_scheduled_tokens={"old": 40})):
        pass
    runtime.calls.clear()
    recorder.seen.clear()
    return runtime, recorder, watched


def test_a_pass_is_shown_as_it_is() -> None:
    runtime, recorder, watched = make_recorded([51, 30])
    run_step(watched, make_step())
    assert recorder.seen == [
        ("old", 40, 50, 1, TABLE[0].tolist()),
        ("new", 30, 0, 30, TABLE[1].tolist()),
        (0, 31),
        (1, 31),
        "end",
    ]
    assert runtime.calls == ["begin 7", ROWS, "tables 3", "attended 0", "attended 1", "end"]
    assert watched.layer_names == runtime.layer_names


def test_passes_outside_of_a_step_are_not_shown() -> None:
    runtime, recorder, watched = make_recorded([51, 30])
    some = torch.zeros(1, 1, 1)
    watched.attended(0, some, some, some, some)
    assert recorder.seen == []
    assert runtime.calls == ["attended 0"]


def test_rows_without_all_their_blocks_are_refused() -> None:
    _, _, watched = make_recorded([35, 30])
    with pytest.raises(IntegrityError, match="request old has 35 of 51 tokens on the device"):
        run_step(watched, make_step())


def test_preemption_is_refused() -> None:
    _, _, watched = make_recorded([51, 30])
    with pytest.raises(IntegrityError, match="were preempted; lower --batch"):
        run_step(watched, make_step(preempted=("old",)))


def test_the_oracle_hears_how_far_requests_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: dict[str, int] = {}
    future = SimpleNamespace(advance=heard.__setitem__)
    monkeypatch.setattr("flashmemory_vllm.indexer.oracle.OracleSelector.future", future)
    runtime = Runtime([51, 30])
    run_step(TimedRuntime(runtime), make_step())  # type: ignore[arg-type]
    assert heard == {"old": 51, "new": 30}
    assert runtime.calls[0] == "begin 7"
