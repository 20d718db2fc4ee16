"""What becomes of a request whose KV came back from the host other than it was saved: an error, never text."""

from collections.abc import Collection
from copy import copy
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger
from vllm.v1.outputs import AsyncModelRunnerOutput, KVConnectorOutput, ModelRunnerOutput

from flashmemory_vllm.runtime.runtime import ResidencyRuntime
from flashmemory_vllm.transfer.checksums import Comparison
from flashmemory_vllm.transfer.engine import TransferCounters

# vLLM sets up handlers for the names below its own only.
logger = init_logger("vllm.flashmemory")

# What the user reads.
BROKEN_KV = (
    "flashmemory: KV of this request came back from host memory with another checksum than it was saved with. "
    "The request is failed rather than answered from it; send it again"
)


@dataclass
class BrokenBlocks(KVConnectorOutput):
    """Blocks whose content is lost, in vLLM's own words for KV that could not be loaded."""


class PageJudge:
    """Joins the outputs of one rank's steps with the comparisons of what they have read.

    Args:
        rank: of the worker.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._unread: list[Comparison] = []

    def judged(self, output: Any, runtime: ResidencyRuntime | None) -> Any:
        """A step's output that names the broken blocks which the step has read, if there are any.

        Args:
            output: vLLM's, or a promise of it, in which case nothing is waited for now. None if it comes later.
            runtime: has run the step. None while vLLM warms up.
        """
        if output is None or runtime is None:
            return output
        comparisons, counters = runtime.take_comparisons(), runtime.moved
        if self._rank != 0:
            self._judge_alone(comparisons, counters)
        elif comparisons and isinstance(output, AsyncModelRunnerOutput):
            return _JudgedOutput(output, comparisons, counters)
        elif comparisons:
            return _with_broken_blocks(output, comparisons, counters)
        return output

    def _judge_alone(self, comparisons: tuple[Comparison, ...], counters: TransferCounters) -> None:
        """End the worker, and with it the engine: nobody reads the outputs of ranks but the first.

        An error would not do: vLLM logs it, and the other ranks wait for this one for ever.
        """
        self._unread += comparisons
        over = [comparison for comparison in self._unread if comparison.is_over]
        self._unread = [comparison for comparison in self._unread if not comparison.is_over]
        if broken_blocks(over, counters):
            raise SystemExit(f"flashmemory: rank {self._rank} has read broken KV; the engine ends")


def broken_blocks(comparisons: Collection[Comparison], counters: TransferCounters) -> set[int]:
    """The blocks some of whose pages are not what was saved; waits until it is known, counts and logs them."""
    blocks: set[int] = set()
    for comparison in comparisons:
        wrong = comparison.wrong_pages()
        counters.wrong_pages += int(wrong.sum())
        blocks.update(comparison.blocks[wrong.any(axis=0)].tolist())
    if blocks:
        logger.error(
            "flashmemory: KV blocks %s came back from host memory with other checksums than they were saved with; "
            "the requests that hold them fail. Suspect the host's memory, and see docs/troubleshooting.md",
            sorted(blocks),
        )
    return blocks


class _JudgedOutput(AsyncModelRunnerOutput):
    """Judges when the output is asked for: the step is over then, and so are its comparisons."""

    def __init__(
        self, output: AsyncModelRunnerOutput, comparisons: tuple[Comparison, ...], counters: TransferCounters
    ) -> None:
        self._output = output
        self._comparisons = comparisons
        self._counters = counters

    def get_output(self) -> ModelRunnerOutput:
        return _with_broken_blocks(self._output.get_output(), self._comparisons, self._counters)


def _with_broken_blocks(
    output: ModelRunnerOutput, comparisons: tuple[Comparison, ...], counters: TransferCounters
) -> ModelRunnerOutput:
    blocks = broken_blocks(comparisons, counters)
    if blocks:
        # vLLM has one object for all steps without tokens.
        output = copy(output)
        output.kv_connector_output = BrokenBlocks(invalid_block_ids=blocks)
    return output
