"""Puts a worker's runtime together from its configuration and its allocated KV cache."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from flashmemory_kernels.choose_sets import ChoicePolicy

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.errors import FlashMemoryError
from flashmemory_vllm.indexer.base import IndexGeometry, Selector
from flashmemory_vllm.indexer.factory import create_selector, option_names
from flashmemory_vllm.indexer.places import MemoryKind
from flashmemory_vllm.kinds.base import PageKind
from flashmemory_vllm.observability.counters import CounterWriter
from flashmemory_vllm.residency.budget import BudgetPolicy, cdiv
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.residency.types import Geometry
from flashmemory_vllm.runtime.choice import ChoiceSizes, ChoiceState
from flashmemory_vllm.runtime.choices import ChoiceQueue
from flashmemory_vllm.runtime.parts import RuntimeParts, StepBuffers
from flashmemory_vllm.runtime.prefill import StreamedPrefill
from flashmemory_vllm.runtime.queries import QueryRing
from flashmemory_vllm.runtime.question import QuestionQueries
from flashmemory_vllm.runtime.runtime import ResidencyRuntime
from flashmemory_vllm.runtime.shape import AttentionShape
from flashmemory_vllm.runtime.side_stream import SideStream
from flashmemory_vllm.runtime.tables import StepTables, TableSizes
from flashmemory_vllm.runtime.trained import anchor_layers, hysteresis, num_kept, opening_steps, query_window, tau_steps
from flashmemory_vllm.runtime.uploads import UploadRing
from flashmemory_vllm.transfer.checksums import COMPARED
from flashmemory_vllm.transfer.engine import CpuTransferEngine, TransferEngine
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import PageLayout
from flashmemory_vllm.transfer.staging import NUM_STAGING_BUFFERS

# Below vLLM's logger, which alone has handlers
logger = logging.getLogger("vllm.flashmemory")

Made = TypeVar("Made")

# Most blocks of a request that come with one list, unless it is in force at once
MOST_LISTED = 64
# Elements that tables of blocks are a multiple of: Triton compiles other code for sizes that 16 does not divide
WIDTH_MULTIPLE = 16


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
    kind: PageKind,
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
        kind: what their pages mean.
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
            planner=_planner(sizes, budget, config, engine.layout),
            engine=engine,
            kind=kind,
            selector=selector,
            choices=_choices(selector, config, budget, buffers),
            buffers=buffers,
            questions=QuestionQueries(question_window(selector, config, budget), len(anchors), shape),
            prefill=_prefill(engine, kind, config, sizes.staging_blocks),
            counters=counters,
            check_integrity=config.check_integrity,
            poison=config.poison_free_slots,
            id_ring=UploadRing(4 * sizes.max_num_seqs * (1 + len(groups)), shape.device),
        )
    )


def _planner(sizes: RuntimeSizes, budget: BudgetPolicy, config: FlashMemoryConfig, layout: PageLayout) -> StepPlanner:
    geometry = Geometry(
        sizes.num_logical_blocks, layout.num_slots, config.layer_groups, budget.block_size, sizes.max_num_seqs
    )
    group_bytes = max(sum(layout.layer_bytes(layer) for layer in group) for group in layout.groups)
    return _with_loops(
        lambda is_quick: StepPlanner(
            geometry,
            budget,
            tau_steps(config),
            max_prefetches=max(1, (config.prefetch_mib_per_step << 20) // group_bytes),
            fallback_share=config.dense_fallback_share,
            opening_steps=opening_steps(config),
            is_quick=is_quick,
        )
    )


def _with_loops(make: Callable[[bool], Made]) -> Made:
    """Something that is quick with loops that are compiled, which takes a while; slower where they cannot be had."""
    from flashmemory_vllm.residency.quick.compiled import IS_COMPILED  # late, as only workers need it

    if not IS_COMPILED:
        logger.info("flashmemory: no numba for this numpy; steps with many requests take the host longer")
    started = time.perf_counter()
    try:
        made = make(IS_COMPILED)
    except Exception as error:
        if isinstance(error, FlashMemoryError) or not IS_COMPILED:
            raise
        # A full disk, a damaged file of code, a compiler that does not know this processor
        logger.warning("flashmemory: loops cannot be compiled; steps take the host longer", exc_info=True)
        return make(False)
    seconds = time.perf_counter() - started
    if seconds > 1:
        logger.info("flashmemory: loops of %s were compiled in %.1f s", type(made).__name__, seconds)
    return made


def _choices(selector: Selector, config: FlashMemoryConfig, budget: BudgetPolicy, buffers: StepBuffers) -> ChoiceQueue:
    kind, tables = selector.memory_kind, buffers.tables
    threshold = selector.score_threshold if config.score_threshold is None else config.score_threshold
    policy = ChoicePolicy(kind.combine, config.own.successor_share, hysteresis(config), threshold or 0.0)
    sizes = choice_sizes(config, budget, kind, tables.sizes.num_places)
    state = ChoiceState(sizes, buffers.queries.by_place, tables.block_ids, kind, policy)
    side_stream = SideStream(selector.geometry.device)
    return _with_loops(lambda is_quick: ChoiceQueue(selector, state, side_stream, is_quick=is_quick))


def choice_sizes(config: FlashMemoryConfig, budget: BudgetPolicy, kind: MemoryKind, max_num_seqs: int) -> ChoiceSizes:
    """Sizes of what sets are chosen from, for so many requests."""
    width = _width(budget)
    return ChoiceSizes(
        num_channels=len(kind.channels),
        num_groups=config.layer_groups,
        num_places=max_num_seqs,
        width=width,
        max_rows=max_num_seqs,
        listed=min(width, MOST_LISTED),
    )


def _width(budget: BudgetPolicy) -> int:
    """Most blocks of a request: one more than the longest has, for the scheduler may give it ahead, or a few.

    Rows of so many begin where kernels read them fastest, and any number of rows is of the size they are compiled for.
    """
    return cdiv(cdiv(budget.max_model_len, budget.block_size) + 1, WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def table_sizes(config: FlashMemoryConfig, budget: BudgetPolicy, max_num_seqs: int, max_num_tokens: int) -> TableSizes:
    """Sizes of the tables for so many requests, and tokens of a batch, padding included."""
    return TableSizes(
        num_groups=config.layer_groups,
        block_size=budget.block_size,
        num_places=max_num_seqs,
        num_kept=num_kept(config),
        max_rows=max_num_seqs,
        max_tokens=max_num_tokens,
        width=_width(budget),
    )


def _buffers(
    sizes: RuntimeSizes, num_anchors: int, shape: AttentionShape, config: FlashMemoryConfig, budget: BudgetPolicy
) -> StepBuffers:
    of_tables = table_sizes(config, budget, sizes.max_num_seqs, sizes.max_num_tokens)
    tables = StepTables(of_tables, shape.device, skip_streamed=shape.device.type == "cuda")
    return StepBuffers(tables, QueryRing(num_anchors, sizes.max_num_seqs, of_tables.num_kept, shape))


def _prefill(engine: TransferEngine, kind: PageKind, config: FlashMemoryConfig, staging_blocks: int) -> StreamedPrefill:
    layout = engine.layout
    largest = max(map(layout.layer_bytes, range(layout.num_layers)))
    size = (NUM_STAGING_BUFFERS, staging_blocks, largest)
    return StreamedPrefill(
        engine,
        kind,
        torch.zeros(size, dtype=torch.uint8, device=layout.device),
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
    known = config.model_dump() | config.own._asdict() | {"tau_steps": tau_steps(config)}
    return create_selector(config.selector, geometry, **{name: known[name] for name in option_names(config.selector)})
