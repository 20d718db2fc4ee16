"""Puts a worker's runtime together from its configuration and its allocated KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch

from flashmemory_vllm.config import SECTION, FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.indexer.base import IndexGeometry, Selector
from flashmemory_vllm.indexer.checkpoint import read_spec, resolve_indexer
from flashmemory_vllm.indexer.factory import create_selector, option_names
from flashmemory_vllm.indexer.neural_model import IndexerSpec
from flashmemory_vllm.observability.counters import CounterWriter
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.residency.types import Geometry
from flashmemory_vllm.residency.worth import Worth
from flashmemory_vllm.runtime.drift import QueryDrift
from flashmemory_vllm.runtime.parts import RuntimeParts, StepBuffers
from flashmemory_vllm.runtime.prefill import StreamedPrefill
from flashmemory_vllm.runtime.queries import QueryRing
from flashmemory_vllm.runtime.question import QuestionQueries
from flashmemory_vllm.runtime.runtime import ResidencyRuntime
from flashmemory_vllm.runtime.selection import SelectionQueue
from flashmemory_vllm.runtime.shape import AttentionShape
from flashmemory_vllm.runtime.side_stream import SideStream
from flashmemory_vllm.runtime.tables import StepTables, TableSizes
from flashmemory_vllm.transfer.checksums import COMPARED
from flashmemory_vllm.transfer.engine import CpuTransferEngine, TransferEngine
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import PageLayout
from flashmemory_vllm.transfer.page_format import PageFormat
from flashmemory_vllm.transfer.staging import NUM_STAGING_BUFFERS
from flashmemory_vllm.transfer.streaming import PartialAttention

# Newest queries of each request that the device keeps. A selection reads one; its question is kept by itself.
NUM_KEPT = 1


def anchor_layers(config: FlashMemoryConfig, shape: AttentionShape) -> tuple[int, ...]:
    """The layers whose queries and keys feed the selector: those asked for, a trained indexer's own, or the default.

    Raises:
        ConfigError: a layer does not exist, a group has none, or the indexer cannot be read or is for another depth.
    """
    given = config.anchor_layers
    spec = _trained(config)
    if spec is not None:
        if spec.num_layers != shape.num_layers:
            raise ConfigError(
                f"{SECTION}.indexer: {config.indexer!r} was trained for a model of {spec.num_layers} attention layers, "
                f"this one has {shape.num_layers}"
            )
        given = spec.anchor_layers if given is None else given
    return shape.anchor_layers(given, shape.layer_groups(config.layer_groups))


def tau_steps(config: FlashMemoryConfig) -> int:
    """Decode steps between two selections: those asked for, a trained indexer's own, or the default.

    Raises:
        ConfigError: the indexer cannot be read, or was trained for fewer steps than a selection is late.
    """
    trained = _trained(config)
    return config.tau(None if trained is None else trained.tau)


def query_window(config: FlashMemoryConfig) -> int:
    """Prompt tokens of a first selection: those asked for, a trained indexer's own, or the last one.

    Raises:
        ConfigError: the indexer cannot be read.
    """
    trained = _trained(config)
    return config.query_window or (1 if trained is None else trained.query_window)


def opening_steps(config: FlashMemoryConfig) -> int:
    """Decode steps that each end with a selection of their own: those asked for, a trained indexer's own, or none.

    Raises:
        ConfigError: the indexer cannot be read.
    """
    if config.opening_steps is not None:
        return config.opening_steps
    trained = _trained(config)
    return 0 if trained is None else trained.opening_steps


def _trained(config: FlashMemoryConfig) -> IndexerSpec | None:
    """What the indexer was trained with, if there is one."""
    return None if config.indexer is None else read_spec(resolve_indexer(config.indexer, config.indexer_revision))


def unallocated_selector(config: FlashMemoryConfig, shape: AttentionShape) -> Selector:
    """The selector asked for, of one logical block and without memory: it tells what it needs."""
    return _selector(config, _geometry(config, shape, 1, torch.device("meta")))


def question_window(selector: Selector, config: FlashMemoryConfig, budget: BudgetPolicy) -> int:
    """Prompt tokens whose queries are kept; 0 where nobody asks: no request is ever sparse, or no query is read."""
    is_asked = selector.needs_queries and not budget.keeps_all(budget.max_model_len)
    return query_window(config) if is_asked else 0


@dataclass(frozen=True, slots=True)
class RuntimeSizes:
    """Sizes a runtime is built with.

    Attributes:
        num_logical_blocks: N.
        staging_blocks: blocks of one layer in each staging buffer.
        max_num_seqs: most requests in a batch.
        max_num_tokens: most tokens in a batch, padding included.
    """

    num_logical_blocks: int
    staging_blocks: int
    max_num_seqs: int
    max_num_tokens: int


def build_runtime(  # noqa: PLR0913 - the one place where everything meets
    *,
    shape: AttentionShape,
    caches: Sequence[torch.Tensor],
    page_format: PageFormat,
    attend: PartialAttention,
    config: FlashMemoryConfig,
    budget: BudgetPolicy,
    sizes: RuntimeSizes,
    counters: CounterWriter,
    buffers: StepBuffers | None = None,
    pool: HostPool | None = None,
) -> ResidencyRuntime:
    """Allocate the host pool, index keys and staging, and wire the runtime. Changes nothing before all could be had.

    Args:
        shape: the model's attention layers.
        caches: per layer the device KV cache [S, ...page].
        page_format: what lies inside a page.
        attend: attention over a part of the keys.
        config: our options.
        budget: slots of one request.
        sizes: what was planned, and the largest batch.
        counters: this worker's shared counters.
        buffers: of an earlier runtime with the same layer groups and anchor layers, which captured CUDA graphs
            refer to. Default: None, new ones.
        pool: host memory of an earlier runtime over the same caches, to be taken over. Default: None, a new one.

    Raises:
        ConfigError: host memory cannot be had, or an option does not fit the model.
    """
    groups, anchors = shape.layer_groups(config.layer_groups), anchor_layers(config, shape)
    selector = _selector(config, _geometry(config, shape, sizes.num_logical_blocks, shape.device))
    engine = _engine(PageLayout(caches, groups), sizes.num_logical_blocks, config, pool)
    buffers = buffers or _buffers(sizes, len(anchors), shape, config, budget)
    return ResidencyRuntime(
        RuntimeParts(
            shape=shape,
            groups=groups,
            anchors=anchors,
            planner=_planner(sizes, budget, config, engine.layout, selector.score_threshold),
            engine=engine,
            page_format=page_format,
            selector=selector,
            selections=_selections(selector, config, buffers.queries),
            buffers=buffers,
            questions=QuestionQueries(question_window(selector, config, budget), len(anchors), shape),
            prefill=_prefill(engine, page_format, shape, attend, config, sizes.staging_blocks),
            counters=counters,
            check_integrity=config.check_integrity,
            poison=config.poison_free_slots,
        )
    )


def _planner(
    sizes: RuntimeSizes,
    budget: BudgetPolicy,
    config: FlashMemoryConfig,
    layout: PageLayout,
    selectors_threshold: float | None,
) -> StepPlanner:
    geometry = Geometry(
        sizes.num_logical_blocks, layout.num_slots, config.layer_groups, budget.block_size, sizes.max_num_seqs
    )
    group_bytes = max(sum(layout.layer_bytes(layer) for layer in group) for group in layout.groups)
    threshold = selectors_threshold if config.score_threshold is None else config.score_threshold
    return StepPlanner(
        geometry,
        budget,
        tau_steps(config),
        -inf if threshold is None else threshold,
        max_prefetches=max(1, (config.prefetch_mib_per_step << 20) // group_bytes),
        fallback_share=config.dense_fallback_share,
        opening_steps=opening_steps(config),
        worth=Worth(config.memory_decay, config.successor_share, config.hysteresis),
    )


def _selections(selector: Selector, config: FlashMemoryConfig, queries: QueryRing) -> SelectionQueue:
    side_stream, delay_steps = SideStream(selector.geometry.device), config.selection_delay_steps
    drift = None
    if config.drift_threshold is not None:
        drift = QueryDrift(config.drift_threshold, delay_steps, queries, side_stream)
    return SelectionQueue(selector, delay_steps, side_stream, drift)


def table_sizes(config: FlashMemoryConfig, budget: BudgetPolicy, max_num_seqs: int, max_num_tokens: int) -> TableSizes:
    """Sizes of the tables for so many requests, and tokens of a batch, padding included."""
    return TableSizes(
        num_groups=config.layer_groups,
        block_size=budget.block_size,
        num_places=max_num_seqs,
        num_kept=NUM_KEPT,
        max_rows=max_num_seqs,
        max_tokens=max_num_tokens,
        width=-(-budget.max_model_len // budget.block_size) + 1,
    )


def _buffers(
    sizes: RuntimeSizes, num_anchors: int, shape: AttentionShape, config: FlashMemoryConfig, budget: BudgetPolicy
) -> StepBuffers:
    of_tables = table_sizes(config, budget, sizes.max_num_seqs, sizes.max_num_tokens)
    tables = StepTables(of_tables, shape.device, skip_streamed=shape.device.type == "cuda")
    return StepBuffers(tables, QueryRing(num_anchors, sizes.max_num_seqs, NUM_KEPT, shape))


def _prefill(
    engine: TransferEngine,
    page_format: PageFormat,
    shape: AttentionShape,
    attend: PartialAttention,
    config: FlashMemoryConfig,
    staging_blocks: int,
) -> StreamedPrefill:
    layout = engine.layout
    largest = max(map(layout.layer_bytes, range(layout.num_layers)))
    size = (NUM_STAGING_BUFFERS, staging_blocks, largest)
    return StreamedPrefill(
        engine,
        page_format,
        torch.zeros(size, dtype=torch.uint8, device=layout.device),
        shape.softmax_scale,
        attend,
        poison=config.poison_free_slots,
    )


def _engine(layout: PageLayout, num_blocks: int, config: FlashMemoryConfig, pool: HostPool | None) -> TransferEngine:
    compared, is_cuda = COMPARED[config.page_checksums], layout.device.type == "cuda"
    pin = is_cuda and config.pin_host_memory
    pool = HostPool(num_blocks, layout, pin=pin) if pool is None else pool.laid_out(layout)
    if not is_cuda:
        return CpuTransferEngine(layout, pool, compared)
    from flashmemory_vllm.transfer.cuda_engine import CudaTransferEngine

    return CudaTransferEngine(layout, pool, compared)


def _geometry(config: FlashMemoryConfig, shape: AttentionShape, num_blocks: int, device: torch.device) -> IndexGeometry:
    groups, anchors = shape.layer_groups(config.layer_groups), anchor_layers(config, shape)
    group_of = {layer: group for group, layers in enumerate(groups) for layer in layers}
    return IndexGeometry(
        num_logical_blocks=num_blocks,
        block_size=shape.block_size,
        num_query_heads=shape.num_query_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        softmax_scale=shape.softmax_scale,
        anchor_layers=anchors,
        layer_groups=tuple(group_of[layer] for layer in anchors),
        num_groups=config.layer_groups,
        dtype=shape.dtype,
        device=device,
    )


def _selector(config: FlashMemoryConfig, geometry: IndexGeometry) -> Selector:
    """The selector asked for; its options have the names of the configuration fields that they come from."""
    known = config.model_dump() | {"tau_steps": tau_steps(config)}
    return create_selector(config.selector, geometry, **{name: known[name] for name in option_names(config.selector)})
