"""Device memory beside the slots, told before anything is allocated."""

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.indexer.shares import scratch_bytes
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.runtime.assembly import choice_sizes, question_window, table_sizes, unallocated_selector
from flashmemory_vllm.runtime.capacity import BesideSlots, Staging
from flashmemory_vllm.runtime.question import question_bytes
from flashmemory_vllm.runtime.shape import AttentionShape
from flashmemory_vllm.runtime.trained import anchor_layers, num_kept
from flashmemory_vllm.transfer.checksums import COMPARED, SUM_BYTES
from flashmemory_vllm.transfer.staging import NUM_STAGING_BUFFERS

# Tokens that one part of a streamed history holds, where staging may take as much.
STAGED_TOKENS = 16384
STAGING_SHARE = 1 / 32


def beside_slots(
    config: FlashMemoryConfig, shape: AttentionShape, budget: BudgetPolicy, max_num_seqs: int, device_bytes: int
) -> BesideSlots:
    """All that a runtime with these options will allocate beside its slots.

    Requests that wait after a preemption keep their questions, too. They are few, and are not counted.

    Args:
        config: our options.
        shape: the model's attention layers.
        budget: slots of one request.
        max_num_seqs: most requests that run at once.
        device_bytes: device memory for slots and all that is beside them.

    Raises:
        ConfigError: an option does not fit the model, or the indexer cannot be read.
    """
    selector, num_anchors = unallocated_selector(config, shape), len(anchor_layers(config, shape))
    window = question_window(selector, config, budget)
    num_tokens, kind = budget.max_num_batched_tokens, selector.memory_kind
    chosen = choice_sizes(config, budget, kind, max_num_seqs)
    scratch = scratch_bytes(max_num_seqs, chosen.width, num_anchors * shape.num_query_heads)
    return BesideSlots(
        index_bytes_per_block=selector.bytes_per_block(),
        checksum_bytes_per_block=0 if COMPARED[config.page_checksums] is None else shape.num_layers * SUM_BYTES,
        question_bytes=max_num_seqs * question_bytes(min(window, budget.max_model_len), num_anchors, shape),
        table_bytes=table_sizes(config, budget, max_num_seqs, num_tokens).num_bytes
        + max_num_seqs * question_bytes(num_kept(config), num_anchors, shape)
        + chosen.num_bytes
        + scratch * selector.needs_keys,
        staging=plan_staging(config, shape, device_bytes),
    )


def index_bytes_per_block(config: FlashMemoryConfig, shape: AttentionShape) -> int:
    """Device bytes of one logical block's index keys."""
    return unallocated_selector(config, shape).bytes_per_block()


def plan_staging(config: FlashMemoryConfig, shape: AttentionShape, device_bytes: int) -> Staging:
    """The staging buffers: as asked for, or parts of 16K tokens where that is a small share of the device memory.

    The longer the parts, the less merging them costs beside attention; below that share, a few more slots serve
    better.

    Args:
        config: our options.
        shape: the model's attention layers.
        device_bytes: device memory for slots and all that is beside them.
    """
    bytes_per_block = NUM_STAGING_BUFFERS * shape.block_bytes // shape.num_layers
    blocks = config.staging_blocks
    if blocks is None:
        affordable = int(device_bytes * STAGING_SHARE) // bytes_per_block
        blocks = max(1, min(STAGED_TOKENS // shape.block_size, affordable))
    return Staging(blocks, blocks * bytes_per_block)
