"""Scheduler side of a model that has other layers beside ours: a managed group with blocks of its own.

vLLM gives the blocks of all groups out of one pool and sizes that by device memory. The managed group's blocks lie in
host memory, so they are another pool's, of another number and with another size; the device pool is left to the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from flashmemory_vllm.observability.counters import read_capacity
from flashmemory_vllm.plugin.admission import FlashMemoryManager, FlashMemorySpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class HybridSpec(FlashMemorySpec):
    """The spec of a managed layer among native ones: to vLLM its pages are theirs, and take no memory.

    vLLM makes groups of layers by the sizes of their pages. With the page of the others it makes those that it makes
    without us, and one of ours.

    Args:
        native_page_bytes: bytes of a native layer's page.
    """

    native_page_bytes: int = 0

    @classmethod
    def among(cls, native_page_bytes: int, spec: FullAttentionSpec, *args: Any) -> Self:
        """As `from_spec`, of a layer among native ones, whose pages have so many bytes.

        Raises:
            UnsupportedError: as there.
        """
        return replace(cls.from_spec(replace(spec, page_size_padded=None), *args), native_page_bytes=native_page_bytes)

    @property
    def page_size_bytes(self) -> int:
        """The others'."""
        return self.native_page_bytes

    def max_memory_usage_bytes(self, vllm_config: "VllmConfig") -> int:  # noqa: ARG002 - vLLM's signature
        """Nothing of the device pool."""
        return 0

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """As ours; only with each other."""
        if not all(type(spec) is cls for spec in specs):
            raise AssertionError("managed layers and others are never of one group")
        return replace(super().merge(specs), native_page_bytes=specs[0].native_page_bytes)


class HybridManager(FlashMemoryManager):
    """Block manager of the managed group; its blocks come from a pool of the host's size."""

    block_pool: BlockPool

    def __init__(self, kv_cache_spec: HybridSpec, **kwargs: Any) -> None:
        """As ours; reads how many blocks the host holds, too."""
        super().__init__(kv_cache_spec, **kwargs)
        self._device_pool = device_pool = self.block_pool
        num_blocks = read_capacity(Path(kv_cache_spec.counters_dir)).num_logical_blocks
        self.block_pool = BlockPool(num_blocks, device_pool.enable_caching, device_pool.hash_block_size)
        self._null_block = self.block_pool.null_block
        # Requests whose prefix hits were not compared with what the host has
        self._just_admitted: set[str] = set()
        self._count_native()

    @property
    def records_new_block_ids(self) -> bool:
        """Never: vLLM zeroes blocks of the device pool."""
        return False

    def take_new_block_ids(self) -> list[int]:
        """As ours, and none."""
        super().take_new_block_ids()
        self._count_native()
        return []

    def allocate_new_blocks(self, request_id: str, *args: Any) -> list[KVCacheBlock]:
        """As ours; remembers who comes."""
        if not self._ledger.is_admitted(request_id):
            self._just_admitted.add(request_id)
        return super().allocate_new_blocks(request_id, *args)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """As ours; before the blocks of a request that has just come are found, counts those that it could have had."""
        if request.request_id in self._just_admitted:
            self._just_admitted.remove(request.request_id)
            self._counters.add("lost_prefix_tokens_total", self._lost_tokens(request))
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """As ours."""
        self._just_admitted.discard(request_id)
        return super().pop_blocks_for_free(request_id)

    def _lost_tokens(self, request: Request) -> int:
        """Tokens behind a request's prefix hit that would be of it, were there our blocks alone."""
        if request.skip_reading_prefix_cache:
            return 0
        hit = self.num_cached_block.get(request.request_id, 0)
        most = max(0, request.num_tokens - self.kv_cache_spec.least_recomputed) // self.block_size
        ours = [self.kv_cache_group_id]
        known = takewhile(lambda name: self.block_pool.get_cached_block(name, ours), request.block_hashes[hit:most])
        reached = (hit + sum(1 for _ in known)) * self.block_size
        return max(0, reached - reached % self.cache_hit_alignment_tokens - hit * self.block_size)

    def _count_native(self) -> None:
        """Blocks of the device pool; vLLM takes the null block, and what waits for a prefix hit counts as free."""
        total = self._device_pool.num_gpu_blocks - 1
        self._counters.set("native_blocks_total", total)
        self._counters.set("native_blocks_used", total - self._device_pool.get_num_free_blocks())

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> int:
        """Blocks of the device pool: none, or more than there are when slots or host blocks do not suffice."""
        needed = super().get_num_blocks_to_allocate(request_id, num_tokens, new_computed_blocks, *args, **kwargs)
        return 0 if needed <= self.block_pool.get_num_free_blocks() else int(self._device_pool.num_gpu_blocks) + 1


def _register() -> None:
    KVCacheSpecRegistry.register(HybridSpec, HybridManager, uniform_type_base_spec=HybridSpec)


# At import, as in `admission`, which registers vLLM's own first.
_register()
