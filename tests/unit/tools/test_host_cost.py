"""The measurement of host time runs the real runtime, and lists change sets in it."""

from typing import Any

import pytest

from flashmemory_vllm.residency.quick import asking_loops, change_loops, growth_loops, note_loops, slot_loops
from flashmemory_vllm.runtime import choice_loops
from tests.tools import host_cost

LOOPS = (asking_loops, change_loops, choice_loops, growth_loops, note_loops, slot_loops)
ENTRIES = ("ask", "prepare", "may_grow", "grow", "note_rows", "judge", "read_pairs", "follows", "change", "settle")


def test_every_part_is_measured_and_sets_change(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_cost, "WARM_STEPS", 4)
    assert host_cost.main(["--rows", "3", "--tokens", "2000", "--tau", "2", "--steps", "20", "--changes", "1"]) == 0
    title, _, *lines = capsys.readouterr().out.splitlines()
    assert float(title.split(": ")[1].split()[0]) > 0.3
    told = {name.strip(): float(median) for name, _, median, _ in (line.rsplit(maxsplit=3) for line in lines)}
    assert told.keys() == {part for part, *_ in host_cost.PARTS} | {"all selections", "all"}
    assert min(told.values()) >= 0
    assert told["all"] >= told["plan"] + told["choose"] > 0
    # The runtime gives loops what they were compiled for in the beginning
    kinds = {name: len(one.signatures) for module in LOOPS for name, one in vars(module).items() if is_entry(one)}
    assert not kinds or (set(kinds.values()) == {1} and len(kinds) == len(ENTRIES))


def is_entry(loop: Any) -> bool:
    """Whether a loop is one that Python calls: others are compiled into these."""
    return hasattr(loop, "signatures") and loop.py_func.__name__ in ENTRIES
