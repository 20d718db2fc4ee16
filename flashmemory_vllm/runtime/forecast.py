"""What a server would size and serve, worked out without one by the code that sizes it."""

from dataclasses import dataclass, replace

import torch

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.residency.budget import BudgetPolicy, cdiv
from flashmemory_vllm.residency.ledger import SlotLedger
from flashmemory_vllm.runtime.beside import beside_slots
from flashmemory_vllm.runtime.capacity import GIB, CapacityPlan, MemoryBudget, budget_policy, plan_capacity
from flashmemory_vllm.runtime.native import NativeKind, NativePool, native_pool
from flashmemory_vllm.runtime.shape import AttentionShape

# Steps under way at once: vLLM schedules one before that before has ended
CONCURRENT_STEPS = 2


@dataclass(frozen=True, slots=True)
class StateSizes:
    """A state of one layer, in elements: of Mamba 2 or a gated delta net.

    Attributes:
        num_heads: its heads; of values.
        head_dim: elements of a head.
        state_size: for each of these; elements of a key.
        num_groups: groups of heads; heads of keys.
        conv_kernel: tokens of the convolution, of which all but one are kept.
        dtype: of the state; None for that of the convolution, which is the model's.
        num_blocks: that a request holds.
    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    conv_kernel: int
    dtype: torch.dtype | None
    num_blocks: int

    def num_bytes(self, num_ranks: int, model_dtype: torch.dtype) -> int:
        """Bytes on one rank. Groups that cannot be divided are replicated, as in vLLM."""
        groups = self.num_groups if self.num_groups % num_ranks == 0 else num_ranks
        heads = self.num_heads // num_ranks
        convolved = (self.num_heads * self.head_dim + 2 * groups * self.state_size) // num_ranks
        return (
            convolved * (self.conv_kernel - 1) * model_dtype.itemsize
            + heads * self.head_dim * self.state_size * (self.dtype or model_dtype).itemsize
        )


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The sizes of a model that decide about memory; filled from its configuration.

    Attributes:
        layers: indices of those of full attention, among all layers.
        num_query_heads: query heads.
        num_kv_heads: KV heads.
        head_dim: elements of a key.
        dtype: dtype of the weights.
        kv_dtype: dtype of keys and values.
        num_window_layers: layers with a sliding window beside them, otherwise as those.
        window: tokens that such a layer attends to.
        num_state_layers: layers with a state beside them.
        state: of such a layer.
        page_dim: elements of a token and KV head, as `AttentionShape` has them: of latents those of a key.
    """

    layers: tuple[int, ...]
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    num_window_layers: int = 0
    window: int = 0
    num_state_layers: int = 0
    state: StateSizes | None = None
    page_dim: int | None = None

    @property
    def num_layers(self) -> int:
        """Layers of full attention."""
        return len(self.layers)

    @property
    def is_latent(self) -> bool:
        """Whether that attention is to latents, which every rank has all of."""
        return self.page_dim is not None

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

    def native_kinds(self, block_size: int, num_ranks: int) -> list[NativeKind]:
        """The layers beside those of full attention, of a rank's sizes.

        vLLM makes a block of attention as large as a state, and pads the state to it.
        """
        token_bytes = 2 * self.num_kv_heads * self.head_dim * self.kv_dtype.itemsize
        found = []
        if self.num_window_layers:
            found.append(NativeKind(self.num_window_layers, block_size * token_bytes, block_size, self.window))
        if self.state is not None:
            state_block = block_size * cdiv(self.state.num_bytes(num_ranks, self.dtype), block_size * token_bytes)
            page_bytes, held = state_block * token_bytes, self.state.num_blocks
            found.append(NativeKind(self.num_state_layers, page_bytes, state_block, state_blocks=held))
        return found

    def shape(self, block_size: int) -> AttentionShape:
        """The attention layers; nothing is allocated, so that any device does."""
        return AttentionShape(
            layer_names=tuple(map(str, self.layers)),
            num_query_heads=self.num_query_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            softmax_scale=1.0,
            block_size=block_size,
            dtype=self.kv_dtype,
            device=torch.device("cpu"),
            page_dim=self.page_dim,
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
        native: blocks of windows and states; None for a model without.
        native_bytes: their device memory.
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
    native: NativePool | None = None
    native_bytes: int = 0

    @property
    def native_blocks(self) -> int:
        """Blocks of windows and states, the null block included."""
        return 0 if self.native is None else self.native_bytes // self.native.block_bytes

    def kept_prefixes(self, max_num_seqs: int) -> int:
        """Prefixes whose last window or state is kept for hits while so many requests run."""
        assert self.native is not None
        return max(0, self.native.requests_in(self.native_bytes) - max_num_seqs)


def forecast(model: ModelSizes, config: FlashMemoryConfig, server: ServerSizes) -> Forecast:
    """Size a server as its worker does, and count the requests of the longest context that it decodes at once.

    Args:
        model: sizes of the model.
        config: our options; `host_memory_gib` must be given, since there is no machine to measure.
        server: what the server is started with.

    Raises:
        ConfigError: the sizes do not fit, there is no host memory given, or the server would refuse an option with this
            model or with so many ranks.
    """
    if config.host_memory_gib is None:
        raise ConfigError("flashmemory.host_memory_gib is not given: a plan needs it, allowed is a number > 0")
    num_ranks = server.tensor_parallel_size
    _refuse_together(model, config, num_ranks)
    of_rank = model.of_rank(num_ranks)
    shape = of_rank.shape(server.block_size)
    budget = budget_policy(
        config,
        block_size=server.block_size,
        max_num_batched_tokens=server.max_num_batched_tokens,
        max_model_len=server.context_tokens,
    )
    host_bytes = int(config.host_memory_gib * GIB) // num_ranks
    kinds = of_rank.native_kinds(server.block_size, num_ranks)
    in_flight = CONCURRENT_STEPS * server.max_num_batched_tokens
    native = native_pool(kinds, model.num_layers, in_flight, server.context_tokens) if kinds else None
    native_bytes = native.num_bytes(server.max_num_seqs, server.device_bytes) if native else 0
    device_bytes = server.device_bytes - native_bytes
    capacity = plan_capacity(
        MemoryBudget(device_bytes, host_bytes, config.device_slots, server.max_num_seqs),
        budget,
        shape.block_bytes,
        beside_slots(config, shape, budget, server.max_num_seqs, device_bytes),
    )
    request_blocks = cdiv(server.context_tokens, server.block_size)
    limits = {
        "--max-num-seqs": server.max_num_seqs,
        "device slots": _requests_in_slots(capacity.num_slots, budget, at_most=server.max_num_seqs),
        "windows and states": native.requests_in(native_bytes) if native else server.max_num_seqs,
        _host_limit(capacity, host_bytes): (capacity.num_logical_blocks - 1) // request_blocks,
    }
    limited_by = min(limits, key=limits.__getitem__)
    return Forecast(
        capacity=capacity,
        request_kv_bytes=request_blocks * shape.block_bytes,
        request_decode_slots=budget.decode_budget(server.context_tokens),
        num_requests=limits[limited_by],
        limited_by=limited_by,
        dense_num_requests=_dense_requests(server, shape.block_bytes * request_blocks, native, shape.block_bytes),
        native=native,
        native_bytes=native_bytes,
    )


def _refuse_together(model: ModelSizes, config: FlashMemoryConfig, num_ranks: int) -> None:
    """As the server does."""
    if num_ranks > 1 and config.mode == "pressure":
        raise ConfigError(f"flashmemory.mode is pressure with {num_ranks} ranks: allowed is always, or one rank")
    if num_ranks > 1 and config.indexer is not None:
        raise ConfigError(f"flashmemory.indexer is {config.indexer!r} with {num_ranks} ranks: allowed is one rank")
    if num_ranks > 1 and model.is_latent:
        raise ConfigError(
            f"--tensor-parallel-size is {num_ranks} with latent attention: allowed is 1, each rank would keep all "
            "latents in host memory of its own"
        )
    if config.indexer is not None and model.is_latent:
        raise ConfigError(f"flashmemory.indexer is {config.indexer!r} with latent attention: allowed is unset")


def _host_limit(capacity: CapacityPlan, host_bytes: int) -> str:
    """What limits the host's blocks."""
    if capacity.num_logical_blocks == host_bytes // capacity.block_bytes:
        return "host blocks"
    return "host blocks, by the device memory of their index keys and checksums"


def _dense_requests(server: ServerSizes, request_bytes: int, native: NativePool | None, block_bytes: int) -> int:
    """Requests of so many bytes in layers of full attention that stock vLLM holds; it keeps one block for itself."""
    if native is None:
        return max(0, server.device_bytes // block_bytes - 1) // (request_bytes // block_bytes)
    beside = native.decode_blocks * native.block_bytes
    prefill = (native.request_blocks + 1) * native.block_bytes - beside
    return max(0, server.device_bytes - prefill) // (request_bytes + beside)


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
