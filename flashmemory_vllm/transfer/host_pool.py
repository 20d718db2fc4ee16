"""The host tier: one row of (pinned) memory for every logical block."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import torch

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.transfer.layout import PageLayout, PageRun

# Pinning costs about 0.6 s per GiB, so this is also the interval of progress reports.
PIN_CHUNK_BYTES = 1 << 30


class HostPool:
    """Host memory [N, block_elems], block-outermost: all layers of a block contiguous.

    The memory is mapped once and pinned piece by piece with `cudaHostRegister`: torch's own pinned allocator
    rounds a request up to a power of two, which would double a pool of tens of GiB.

    Args:
        num_blocks: N.
        layout: order of the layers in a row.
        pin: make the memory reachable by the GPU. Default: False.
        progress: called with (bytes pinned, bytes in total) after each piece.

    Raises:
        ConfigError: the memory cannot be mapped or pinned.
    """

    def __init__(
        self,
        num_blocks: int,
        layout: PageLayout,
        pin: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.layout = layout
        self.num_bytes = num_blocks * layout.block_bytes
        try:
            memory = mmap.mmap(-1, self.num_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"cannot map the host pool: {num_blocks} blocks of {layout.block_bytes} bytes "
                f"({self.num_bytes / 2**30:.2f} GiB): {error}; ask for less host memory"
            ) from error
        self.pages = torch.frombuffer(memory, dtype=layout.dtype).view(num_blocks, layout.block_elems)
        self._pinned: list[int] = []
        if pin:
            self._pin(progress)

    def layer_view(self, layer: int) -> torch.Tensor:
        """One layer's pages [N, page_elems], strided, in the cache dtype."""
        return self.pages[:, self.layout.host_range(layer)]

    def run_view(self, run: PageRun) -> torch.Tensor:
        """The pages of a run [N, num_elems], strided, in the cache dtype."""
        return self.pages[:, run.host_start : run.host_start + run.num_elems]

    def poison(self) -> None:
        """Fill the pool with 0xFF bytes, NaN in every float format of a cache (for tests)."""
        self.pages.view(torch.uint8).fill_(0xFF)

    def close(self) -> None:
        """Unpin; the pool must not be used afterwards."""
        for address in self._pinned:
            _cuda_runtime().cudaHostUnregister(address)
        self._pinned.clear()

    def _pin(self, progress: Callable[[int, int], None] | None) -> None:
        runtime, base = _cuda_runtime(), self.pages.data_ptr()
        for start in range(0, self.num_bytes, PIN_CHUNK_BYTES):
            size = min(PIN_CHUNK_BYTES, self.num_bytes - start)
            status = runtime.cudaHostRegister(base + start, size, 0)
            if int(status) != 0:
                self.close()
                raise ConfigError(
                    f"cannot pin {self.num_bytes / 2**30:.2f} GiB of host pool: failed after "
                    f"{start / 2**30:.2f} GiB (cudaHostRegister: {status}); ask for less host memory "
                    "or raise the memlock limit"
                )
            self._pinned.append(base + start)
            if progress is not None:
                progress(start + size, self.num_bytes)


def _cuda_runtime() -> Any:  # noqa: ANN401 - torch's binding of the CUDA runtime is untyped
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
