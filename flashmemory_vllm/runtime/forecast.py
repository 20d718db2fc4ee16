"""What a server would size and serve, worked out without one by the code that sizes it."""

from dataclasses import dataclass, replace

import torch

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.residency.budget import BudgetPolicy, cdiv
from flashmemory_vllm.residency.ledger import SlotLedger
from flashmemory_vllm.runtime.beside import beside_slots
from flashmemory_vllm.runtime.capacity import GIB, CapacityPlan, MemoryBudget, budget_policy, plan_capacity
from flashmemory_vllm.runtime.shape import AttentionShape


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The sizes of a model that decide about memory; filled from its configuration.

    Attributes:
        num_layers: attention layers.
        num_query_heads: query heads.
        num_kv_heads: KV heads.
        head_dim: elements of a key.
        dtype: dtype of the weights.
        kv_dtype: dtype of keys and values.
    """

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype

    def of_rank(self, num_ranks: int) -> "ModelSizes":
        """The heads that one tensor-parallel rank has; fewer KV heads than ranks are replicated, as in vLLM.

        Raises:
            ConfigError: the heads cannot be divided so.
        """
        query, kv = self.num_query_heads, self.num_kv_heads
        if query % num_ranks or (kv % num_ranks and num_ranks % kv):
            raise ConfigError(
                f"--tensor-parallel-size is {num_ranks}: allowed is a divisor of the model's {query} query heads "
                f"that its {kv} KV heads can be divided by, or that is a multiple of them"
            )
        return replace(self, num_query_heads=query // num_ranks, num_kv_heads=max(1, kv // num_ranks))

    def shape(self, block_size: int) -> AttentionShape:
        """The attention layers; nothing is allocated, so that any device does."""
        return AttentionShape(
            layer_names=tuple(str(layer) for layer in range(self.num_layers)),
            num_query_heads=self.num_query_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            softmax_scale=1.0,
            block_size=block_size,
            dtype=self.kv_dtype,
            device=torch.device("cpu"),
        )


@dataclass(frozen=True, slots=True)
class ServerSizes:
    """What the server is started with; filled from the command line.

    Attributes:
        device_bytes: device memory of each rank for slots and all that is beside them.
        context_tokens: most tokens of a request, and those of each request that is counted.
        max_num_seqs: most requests that run at once.
        max_num_batched_tokens: most tokens of one step.
        block_size: tokens in a block.
        tensor_parallel_size: ranks, which divide heads and host memory among them.
    """

    device_bytes: int
    context_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    tensor_parallel_size: int = 1


@dataclass(frozen=True, slots=True)
class Forecast:
    """What fits; bytes, slots and blocks are those of each rank.

    Attributes:
        capacity: the sizes that the server would log.
        request_kv_bytes: KV of one request of the context, in whole blocks.
        request_decode_slots: slots that such a request decodes with.
        num_requests: requests of the context that decode at once.
        limited_by: what keeps one more from decoding.
        dense_num_requests: requests whose KV fits into the same device memory with stock vLLM.
    """

    capacity: CapacityPlan
    request_kv_bytes: int
    request_decode_slots: int
    num_requests: int
    limited_by: str
    dense_num_requests: int


def forecast(model: ModelSizes, config: FlashMemoryConfig, server: ServerSizes) -> Forecast:
    """Size a server as its worker does, and count the requests of the longest context that it decodes at once.

    Args:
        model: sizes of the model.
        config: our options; `host_memory_gib` must be given, since there is no machine to measure.
        server: what the server is started with.

    Raises:
        ConfigError: the sizes do not fit, there is no host memory given, or the server would refuse to run on so many
            ranks.
    """
    if config.host_memory_gib is None:
        raise ConfigError("flashmemory.host_memory_gib is not given: a plan needs it, allowed is a number > 0")
    num_ranks = server.tensor_parallel_size
    if num_ranks > 1 and config.mode == "pressure":
        raise ConfigError(f"flashmemory.mode is pressure with {num_ranks} ranks: allowed is always, or one rank")
    if num_ranks > 1 and config.indexer is not None:
        raise ConfigError(f"flashmemory.indexer is {config.indexer!r} with {num_ranks} ranks: allowed is one rank")
    shape = model.of_rank(num_ranks).shape(server.block_size)
    budget = budget_policy(
        config,
        block_size=server.block_size,
        max_num_batched_tokens=server.max_num_batched_tokens,
        max_model_len=server.context_tokens,
    )
    host_bytes = int(config.host_memory_gib * GIB) // num_ranks
    capacity = plan_capacity(
        MemoryBudget(server.device_bytes, host_bytes, config.device_slots, server.max_num_seqs),
        budget,
        shape.block_bytes,
        beside_slots(config, shape, budget, server.max_num_seqs, server.device_bytes),
    )
    request_blocks = cdiv(server.context_tokens, server.block_size)
    by_blocks = (capacity.num_logical_blocks - 1) // request_blocks
    by_slots = _requests_in_slots(capacity.num_slots, budget, at_most=server.max_num_seqs)
    # Stock vLLM keeps one block for itself, too
    dense_blocks = max(0, server.device_bytes // shape.block_bytes - 1)
    if min(by_slots, by_blocks) == server.max_num_seqs:
        limit = "--max-num-seqs"
    elif by_slots <= by_blocks:
        limit = "device slots"
    elif capacity.num_logical_blocks == host_bytes // shape.block_bytes:
        limit = "host blocks"
    else:
        limit = "host blocks, by the device memory of their index keys and checksums"
    return Forecast(
        capacity=capacity,
        request_kv_bytes=request_blocks * shape.block_bytes,
        request_decode_slots=budget.decode_budget(server.context_tokens),
        num_requests=min(by_slots, by_blocks),
        limited_by=limit,
        dense_num_requests=dense_blocks // request_blocks,
    )


def _requests_in_slots(num_slots: int, budget: BudgetPolicy, at_most: int) -> int:
    """Requests that the scheduler's ledger lets decode at once when each comes after the others' prefill."""
    ledger = SlotLedger(num_slots, budget)
    context = budget.max_model_len
    prompt = context - 1
    first_chunk = min(prompt, budget.max_num_batched_tokens)
    for index in range(at_most):
        req_id = str(index)
        if not ledger.can_admit(req_id, first_chunk, prompt):
            return index
        ledger.commit(req_id, first_chunk, prompt)
        ledger.commit(req_id, context, prompt)
    return at_most
