"""Every place in an object of ours that still names a request is found, whatever holds it."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import Geometry
from flashmemory_vllm.soak import leftovers
from flashmemory_vllm.soak.leftovers import find_mentions


@dataclass(slots=True)
class _Slotted:
    req_id: str


@dataclass
class _Holder:
    states: dict[str, Any] = field(default_factory=dict)
    waiting: list[Any] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    last: deque[str] = field(default_factory=lambda: deque(maxlen=4))
    other: Any = None


def _as_ours(*kinds: type) -> None:
    for kind in kinds:
        kind.__module__ = leftovers.__name__


_as_ours(_Slotted, _Holder)


def test_keys_values_members_and_attributes_are_found() -> None:
    holder = _Holder({"a": 1, "x": 2}, [_Slotted("b"), ("c",)], {"d", "y"})
    holder.other = holder
    places = find_mentions({"root": holder}, ["a", "b", "c", "d", "e"])
    assert places == ["root.known[]", "root.states[a]", "root.waiting[].req_id", "root.waiting[][]"]


def test_what_forgets_by_itself_and_what_is_not_ours_is_passed_by() -> None:
    class Foreign:
        name = "a"

    holder = _Holder(last=deque(["a"], maxlen=4), other=Foreign())
    assert find_mentions({"root": holder}, ["a"]) == []
    assert find_mentions({"root": _Holder(other=deque(["a"]))}, ["a"]) == ["root.other[]"]


def test_arrays_are_not_searched() -> None:
    table = SlotTable(Geometry(num_slots=4, num_logical_blocks=8, num_groups=1, block_size=4))
    assert find_mentions({"table": table}, ["a"]) == []
