"""The host tier: one row of (pinned) memory for every logical block."""

from __future__ import annotations

import copy
import logging
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from math import lcm
from typing import Any

import torch

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.transfer.layout import POISON, PageLayout, PageRun

# Below vLLM's logger, which alone has handlers.
logger = logging.getLogger("vllm.flashmemory")

GIB = 1 << 30
PIN_CHUNK_BYTES = GIB
REPORT_BYTES = 8 * GIB
MAX_TOUCHING_THREADS = 8


class HostPool:
    """Host memory uint8 [N, block_bytes], block-outermost: all layers of a block contiguous.

    The memory is mapped once and pinned piece by piece with `cudaHostRegister`: torch's own pinned allocator
    rounds a request up to a power of two, which would double a pool of tens of GiB. Most of the time to pin a
    page goes into the kernel finding and clearing it, so threads touch the pieces ahead, in huge pages where
    the system has them.

    Args:
        num_blocks: N.
        layout: order of the layers in a row.
        pin: make the memory reachable by the GPU. Default: False.

    Raises:
        ConfigError: the memory cannot be mapped or pinned.
    """

    def __init__(self, num_blocks: int, layout: PageLayout, pin: bool = False) -> None:
        self.num_blocks = num_blocks
        self.layout = layout
        self.num_bytes = num_blocks * layout.block_bytes
        try:
            memory = mmap.mmap(-1, self.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"cannot map the host pool: {num_blocks} blocks of {layout.block_bytes} bytes "
                f"({self.num_bytes / GIB:.2f} GiB): {error}; ask for less host memory"
            ) from error
        self.pages = torch.frombuffer(memory, dtype=torch.uint8).view(num_blocks, layout.block_bytes)
        self._pinned: list[int] = []
        if pin:
            _advise(memory)
            self._pin()

    def laid_out(self, layout: PageLayout) -> HostPool:
        """The same memory, pinned as it is, with another order of the layers; what lies in it means nothing then.

        Closing either pool closes both.

        Raises:
            ConfigError: a row of that layout has another size.
        """
        if layout.block_bytes != self.layout.block_bytes:
            raise ConfigError(
                f"host pool: rows of {layout.block_bytes} bytes given, allowed are {self.layout.block_bytes}, "
                "as it was mapped with"
            )
        other = copy.copy(self)
        other.layout = layout
        return other

    def layer_view(self, layer: int) -> torch.Tensor:
        """One layer's pages uint8 [N, page_bytes], strided."""
        return self.pages[:, self.layout.host_range(layer)]

    def run_view(self, run: PageRun) -> torch.Tensor:
        """The pages of a run uint8 [N, num_bytes], strided."""
        return self.pages[:, run.host_start : run.host_start + run.num_bytes]

    def poison(self) -> None:
        """Fill the pool with what nobody wrote (for tests)."""
        self.pages.fill_(POISON)

    def close(self) -> None:
        """Unpin; the pool must not be used afterwards."""
        for address in self._pinned:
            _cuda_runtime().cudaHostUnregister(address)
        self._pinned.clear()

    def _pin(self) -> None:
        runtime, started = _cuda_runtime(), time.perf_counter()
        memory = self.pages.view(-1)
        # Whole rows: the copy engines refuse a copy that crosses from one registered piece into the next.
        unit = lcm(self.layout.block_bytes, mmap.PAGESIZE)
        step = max(1, PIN_CHUNK_BYTES // unit) * unit
        pieces = [memory[start : start + step] for start in range(0, self.num_bytes, step)]
        end = 0
        with ThreadPoolExecutor(min(MAX_TOUCHING_THREADS, os.cpu_count() or 1)) as threads:
            for piece in threads.map(_touch, pieces):
                status = runtime.cudaHostRegister(piece.data_ptr(), piece.numel(), 0)
                if int(status) != 0:
                    threads.shutdown(cancel_futures=True)
                    self.close()
                    raise ConfigError(
                        f"cannot pin {self.num_bytes / GIB:.2f} GiB of host pool: failed after "
                        f"{end / GIB:.2f} GiB (cudaHostRegister: {status}); ask for less with host_memory_gib"
                    )
                self._pinned.append(piece.data_ptr())
                start, end = end, end + piece.numel()
                if end // REPORT_BYTES > start // REPORT_BYTES:
                    logger.info(
                        "host pool: %.0f of %.0f GiB pinned in %.0f s",
                        end / GIB, self.num_bytes / GIB, time.perf_counter() - started,
                    )  # fmt: skip


def _touch(piece: torch.Tensor) -> torch.Tensor:
    """Make the kernel find a page for every address of a piece; numpy does it on this thread alone."""
    piece.numpy()[:: mmap.PAGESIZE] = 0
    return piece


def _advise(memory: mmap.mmap) -> None:
    """Ask for huge pages, and keep the pool out of forked children.

    A child would share its pages copy-on-write: at the parent's next write the kernel could give the parent
    another page than the one the GPU knows.
    """
    memory.madvise(mmap.MADV_DONTFORK)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        logger.debug("host pool: this kernel has no transparent huge pages")


def _cuda_runtime() -> Any:  # noqa: ANN401 - torch's binding of the CUDA runtime is untyped
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
