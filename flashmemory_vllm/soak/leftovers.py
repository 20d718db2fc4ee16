"""What still speaks of requests that are gone: a search through every object of ours, whatever it is called."""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

OURS = __name__.partition(".")[0]


def find_mentions(roots: Mapping[str, object], names: Collection[str]) -> list[str]:
    """Places in our objects that name one of these requests.

    A queue of bounded length is passed by: it forgets by itself.

    Args:
        roots: objects to begin with, by name.
        names: of requests.

    Returns:
        For each mention the way to it, such as `runtime._selections._num_selections[soak-3]`.
    """
    wanted, seen = set(names), set[int]()
    found: list[str] = []
    stack: list[tuple[str, object]] = list(roots.items())
    while stack:
        place, thing = stack.pop()
        if isinstance(thing, str):
            if thing in wanted:
                found.append(place)
            continue
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        stack.extend(_parts(place, thing))
    return sorted(found)


def _parts(place: str, thing: Any) -> Iterator[tuple[str, object]]:  # noqa: ANN401 - any object
    if isinstance(thing, deque) and thing.maxlen is not None:
        return
    if isinstance(thing, Mapping):
        for key, value in list(thing.items()):
            yield f"{place}[{key}]", key
            yield f"{place}[{key}]", value
    elif isinstance(thing, (list, tuple, set, frozenset, deque)):
        yield from ((f"{place}[]", item) for item in thing)
    elif type(thing).__module__.partition(".")[0] == OURS:
        yield from ((f"{place}.{name}", getattr(thing, name)) for name in _attributes(thing) if hasattr(thing, name))


def _attributes(thing: object) -> Iterable[str]:
    slots = [name for owner in type(thing).__mro__ for name in getattr(owner, "__slots__", ())]
    return (*getattr(thing, "__dict__", ()), *slots)
