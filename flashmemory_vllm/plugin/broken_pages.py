"""What becomes of a request whose KV came back from the host other than it was saved: an error, never text."""

from collections.abc import Collection, Sequence
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

    def judged(self, output: Any, runtime: ResidencyRuntime | None) -> Any:
        """A step's output that names the broken blocks which the step has read, if there are any.

        Args:
            output: vLLM's, or a promise of it, in which case nothing is waited for now. None if it comes later.
            runtime: has run the step. None while vLLM warms up.

        Returns:
            The output. Of a rank but the first, whose tokens nobody reads, only the `BrokenBlocks`, or a promise of
            them; None if nothing was compared.
        """
        if output is None or runtime is None:
            return output
        comparisons, counters = runtime.take_comparisons(), runtime.moved
        if self._rank != 0:
            return _Verdict(comparisons, counters) if comparisons else None
        if comparisons and isinstance(output, AsyncModelRunnerOutput):
            return _JudgedOutput(output, comparisons, counters)
        return _with_broken_blocks(output, broken_blocks(comparisons, counters)) if comparisons else output


class OutputsOfRanks:
    """Joins what the ranks of an engine answer to a step; stands where vLLM puts the aggregator of a KV connector."""

    def aggregate(self, outputs: Sequence[Any], output_rank: int = 0) -> Any:
        """The output of one rank, with the broken blocks of all.

        Args:
            outputs: of each rank what `PageJudge.judged` returned.
            output_rank: whose tokens are read.
        """
        output, blocks = outputs[output_rank], set[int]()
        for rank, answer in enumerate(outputs):
            broken = output and output.kv_connector_output if rank == output_rank else answer
            if isinstance(broken, BrokenBlocks):
                blocks |= broken.invalid_block_ids
        return _with_broken_blocks(output, blocks)


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
        output = self._output.get_output()
        return _with_broken_blocks(output, broken_blocks(self._comparisons, self._counters))


class _Verdict(AsyncModelRunnerOutput):
    """What a rank but the first answers: judges when that is asked for."""

    def __init__(self, comparisons: tuple[Comparison, ...], counters: TransferCounters) -> None:
        self._comparisons = comparisons
        self._counters = counters

    def get_output(self) -> BrokenBlocks | None:
        blocks = broken_blocks(self._comparisons, self._counters)
        return BrokenBlocks(invalid_block_ids=blocks) if blocks else None


def _with_broken_blocks(output: ModelRunnerOutput, blocks: set[int]) -> ModelRunnerOutput:
    if blocks:
        # vLLM has one object for all steps without tokens.
        output = copy(output)
        output.kv_connector_output = BrokenBlocks(invalid_block_ids=blocks)
    return output
