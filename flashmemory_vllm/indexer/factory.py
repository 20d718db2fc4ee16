"""Selectors by name."""

from __future__ import annotations

import inspect

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.indexer.base import IndexGeometry, Selector
from flashmemory_vllm.indexer.bounds import BoundsSelector
from flashmemory_vllm.indexer.exact import ExactSelector
from flashmemory_vllm.indexer.heavy_hitter import HeavyHitterSelector
from flashmemory_vllm.indexer.mean import MeanSelector
from flashmemory_vllm.indexer.neural import NeuralSelector
from flashmemory_vllm.indexer.oracle import OracleSelector
from flashmemory_vllm.indexer.positional import FullSelector, RandomSelector, StreamingSelector

_SELECTORS: dict[str, type[Selector]] = {
    selector.name: selector
    for selector in (
        FullSelector,
        StreamingSelector,
        RandomSelector,
        MeanSelector,
        BoundsSelector,
        ExactSelector,
        HeavyHitterSelector,
        NeuralSelector,
        OracleSelector,
    )
}

# The oracle is for evaluation and cannot be served.
SELECTOR_NAMES: tuple[str, ...] = tuple(name for name in _SELECTORS if name != OracleSelector.name)


def create_selector(name: str, geometry: IndexGeometry, **options: object) -> Selector:
    """Build a selector and allocate its index.

    Args:
        name: one of `SELECTOR_NAMES`.
        geometry: sizes.
        options: the selector's own keyword arguments, such as `aggregate` or `seed`.

    Raises:
        ConfigError: the name or an option is unknown, or the selector refuses the geometry.
    """
    known = option_names(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"selector {name!r} takes the options {list(known)}; got {unknown}")
    return _SELECTORS[name](geometry, **options)


def option_names(name: str) -> tuple[str, ...]:
    """Options that a selector takes beside the geometry.

    Raises:
        ConfigError: there is no selector of that name.
    """
    if name not in _SELECTORS:
        raise ConfigError(f"selector must be one of {', '.join(SELECTOR_NAMES)}; got {name!r}")
    return tuple(parameter for parameter in inspect.signature(_SELECTORS[name]).parameters if parameter != "geometry")
