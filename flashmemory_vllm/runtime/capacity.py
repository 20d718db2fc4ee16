"""How many slots and logical blocks fit: one calculation for the server's start and for planning ahead."""

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import NamedTuple

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.residency.budget import BudgetPolicy

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What may be spent; filled by the worker (or by a planning command).

    Attributes:
        device_bytes: device memory for slots and all that is beside them.
        host_bytes: host memory for the pool.
        device_slots: explicit number of slots, or None to fill `device_bytes`.
        max_num_seqs: most requests that run at once.
        device_option: what the user says `device_bytes` with, for messages.
    """

    device_bytes: int
    host_bytes: int
    device_slots: int | None
    max_num_seqs: int
    device_option: str = "--kv-cache-memory-bytes"


class Staging(NamedTuple):
    """The buffers through which prefill streams host blocks.

    Attributes:
        blocks: blocks of one layer in each buffer.
        bytes: device bytes of all buffers.
    """

    blocks: int
    bytes: int


@dataclass(frozen=True, slots=True)
class BesideSlots:
    """Device memory that a server needs beside its slots.

    Attributes:
        index_bytes_per_block: of a logical block's index keys.
        checksum_bytes_per_block: of the checksums of its pages.
        question_bytes: of the kept questions of as many requests as run at once.
        table_bytes: of their tables and newest queries.
        staging: the staging buffers.
    """

    index_bytes_per_block: int
    checksum_bytes_per_block: int
    question_bytes: int
    table_bytes: int
    staging: Staging

    @property
    def bytes_per_block(self) -> int:
        """What each logical block takes."""
        return self.index_bytes_per_block + self.checksum_bytes_per_block

    @property
    def fixed_bytes(self) -> int:
        """What is taken however many blocks there are."""
        return self.question_bytes + self.table_bytes + self.staging.bytes


@dataclass(frozen=True, slots=True)
class CapacityPlan:
    """The sizes the server starts with.

    Attributes:
        num_slots: S, device pages, the null slot included.
        num_logical_blocks: N, blocks of the scheduler and of the host pool, the null block included.
        block_bytes: bytes of one block over all layers.
        beside: what else is on the device.
        request_slots: slots that the longest request may reserve.
    """

    num_slots: int
    num_logical_blocks: int
    block_bytes: int
    beside: BesideSlots
    request_slots: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of the device KV tensor."""
        return self.num_slots * self.block_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of the host pool."""
        return self.num_logical_blocks * self.block_bytes

    @property
    def index_bytes(self) -> int:
        """Device bytes of index keys."""
        return self.num_logical_blocks * self.beside.index_bytes_per_block

    @property
    def checksum_bytes(self) -> int:
        """Device bytes of checksums."""
        return self.num_logical_blocks * self.beside.checksum_bytes_per_block

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"{self.num_slots} slots ({self.slot_bytes / GIB:.3f} GiB on the device) for "
            f"{self.num_logical_blocks} logical blocks ({self.host_bytes / GIB:.3f} GiB on the host), "
            f"index keys {self.index_bytes / GIB:.3f} GiB, checksums {self.checksum_bytes / GIB:.3f} GiB, questions "
            f"{self.beside.question_bytes / GIB:.3f} GiB, tables {self.beside.table_bytes / GIB:.3f} GiB, "
            f"staging {self.beside.staging.bytes / GIB:.3f} GiB; "
            f"the longest request reserves {self.request_slots} slots"
        )


def budget_policy(
    config: FlashMemoryConfig, *, block_size: int, max_num_batched_tokens: int, max_model_len: int
) -> BudgetPolicy:
    """The slot budget of one request: our options, and what vLLM was started with.

    Raises:
        ConfigError: a value is outside of its range.
    """
    return BudgetPolicy(
        block_size=block_size,
        resident_ratio=config.resident_ratio,
        min_sparse_tokens=config.min_sparse_tokens,
        sink_tokens=config.sink_tokens,
        recent_tokens=config.recent_tokens,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        growth_reserve_tokens=config.growth_reserve_tokens,
        mode=config.mode,
    )


def plan_capacity(
    memory: MemoryBudget,
    budget: BudgetPolicy,
    block_bytes: int,
    beside: BesideSlots,
) -> CapacityPlan:
    """Size the device slots and the logical blocks.

    The host sets the number of logical blocks, but never more than the running requests can fill, and never so
    many that what they take on the device leaves too few slots for the longest request, or for the resident share of
    all blocks.

    Args:
        memory: what may be spent.
        budget: slots that one request may hold.
        block_bytes: bytes of a block over all layers.
        beside: what is on the device beside the slots.

    Raises:
        ConfigError: one request of the longest length does not fit in the slots or in the host pool.
    """
    request_blocks = -(-budget.max_model_len // budget.block_size)
    most_blocks = min(memory.host_bytes // block_bytes, memory.max_num_seqs * request_blocks + 1)
    if most_blocks < request_blocks + 1:
        raise ConfigError(
            f"flashmemory.host_memory_gib: {memory.host_bytes / GIB:.4g} GiB holds {most_blocks} blocks of "
            f"{block_bytes} bytes, but one request of --max-model-len {budget.max_model_len} needs "
            f"{request_blocks + 1} ({(request_blocks + 1) * block_bytes / GIB:.4g} GiB); give more host memory or "
            "lower --max-model-len"
        )
    request_slots = budget.worst_case()
    spendable = memory.device_bytes - beside.fixed_bytes
    wanted_slots = request_slots + 1 if memory.device_slots is None else min(memory.device_slots, most_blocks)
    if beside.bytes_per_block:
        most_blocks = min(most_blocks, (spendable - wanted_slots * block_bytes) // beside.bytes_per_block)
    if beside.index_bytes_per_block:
        # Beyond these there would be blocks of which no running request could hold its share
        balanced = int(spendable / (beside.bytes_per_block + budget.resident_ratio * block_bytes))
        most_blocks = min(most_blocks, balanced)
    num_blocks = max(request_blocks + 1, most_blocks)
    affordable = max(0, spendable - num_blocks * beside.bytes_per_block) // block_bytes
    num_slots = min(affordable if memory.device_slots is None else memory.device_slots, num_blocks)
    device = f"{memory.device_bytes} bytes of device memory"
    slots_given = f"flashmemory.device_slots: {memory.device_slots}"
    if num_slots > affordable:
        raise ConfigError(
            f"{slots_given} is more than the {affordable} that {device} leaves beside staging, questions, tables, and "
            f"index keys and checksums of {num_blocks} blocks; give fewer, or raise --kv-cache-memory-bytes or "
            "--gpu-memory-utilization"
        )
    if num_slots - 1 < request_slots:
        needed = (request_slots + 1) * block_bytes + beside.fixed_bytes + (request_blocks + 1) * beside.bytes_per_block
        given = f"{memory.device_option}: {device}" if memory.device_slots is None else slots_given
        raise ConfigError(
            f"{given} makes {num_slots} slots, but one request of --max-model-len {budget.max_model_len} needs "
            f"{request_slots + 1} ({needed} bytes with all beside them); give more, lower --max-model-len or "
            f"--max-num-batched-tokens, or lower flashmemory.min_sparse_tokens ({budget.min_sparse_tokens}) or "
            f"flashmemory.resident_ratio ({budget.resident_ratio})"
        )
    return CapacityPlan(num_slots, num_blocks, block_bytes, beside, request_slots)


def plan_automatic(memory: MemoryBudget, budget: BudgetPolicy, block_bytes: int, beside: BesideSlots) -> CapacityPlan:
    """As `plan_capacity` for `--max-model-len auto`, with the model's own length.

    vLLM would make it shorter later, by the host pool alone, without a look at slots.

    Raises:
        ConfigError: that does not fit; the message has the longest length that does.
    """

    def plan(length: int) -> CapacityPlan:
        return plan_capacity(memory, replace(budget, max_model_len=length), block_bytes, beside)

    def is_too_long(length: int) -> bool:
        try:
            plan(length)
        except ConfigError:
            return True
        return False

    try:
        return plan(budget.max_model_len)
    except ConfigError as error:
        longest = bisect_left(range(1, budget.max_model_len), x=True, key=is_too_long)
        if longest == 0:
            raise
        raise ConfigError(
            f"--max-model-len: auto is the model's own {budget.max_model_len} tokens, allowed: a number, at most "
            f"{longest} ({error})"
        ) from None
