"""Selectors: which blocks of a request are worth a slot."""

from flashmemory_vllm.indexer.base import IndexGeometry, Selector
from flashmemory_vllm.indexer.factory import SELECTOR_NAMES, create_selector

__all__ = ["SELECTOR_NAMES", "IndexGeometry", "Selector", "create_selector"]
