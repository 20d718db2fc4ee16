"""Puts a worker's runtime together from its configuration and its allocated KV cache."""

from collections.abc import Sequence
from math import inf

import torch

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.indexer.base import IndexGeometry
from flashmemory_vllm.indexer.factory import create_selector, option_names
from flashmemory_vllm.observability.counters import CounterWriter
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.residency.types import Geometry
from flashmemory_vllm.runtime.prefill import StreamedPrefill
from flashmemory_vllm.runtime.queries import QueryBuffer
from flashmemory_vllm.runtime.runtime import ResidencyRuntime, RuntimeParts
from flashmemory_vllm.runtime.selection import SelectionQueue
from flashmemory_vllm.runtime.shape import AttentionShape
from flashmemory_vllm.runtime.tables import StepTables
from flashmemory_vllm.transfer.engine import CpuTransferEngine, TransferEngine
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import PageLayout
from flashmemory_vllm.transfer.page_format import PageFormat
from flashmemory_vllm.transfer.streaming import PartialAttention


def index_bytes_per_block(config: FlashMemoryConfig, shape: AttentionShape) -> int:
    """Device bytes of one logical block's index keys, before anything is allocated."""
    meta = create_selector(config.selector, _geometry(config, shape, 1, torch.device("meta")), **_options(config))
    return meta.bytes_per_block()


def staging_bytes(config: FlashMemoryConfig, shape: AttentionShape) -> int:
    """Device bytes of the two staging buffers."""
    return 2 * config.staging_blocks * shape.block_bytes // shape.num_layers


def build_runtime(  # noqa: PLR0913 - the one place where everything meets
    *,
    shape: AttentionShape,
    caches: Sequence[torch.Tensor],
    page_format: PageFormat,
    attend: PartialAttention,
    config: FlashMemoryConfig,
    budget: BudgetPolicy,
    num_logical_blocks: int,
    max_num_seqs: int,
    counters: CounterWriter,
) -> ResidencyRuntime:
    """Allocate the host pool, index keys and staging, and wire the runtime.

    Args:
        shape: the model's attention layers.
        caches: per layer the device KV cache [S, ...page].
        page_format: what lies inside a page.
        attend: attention over a part of the keys.
        config: our options.
        budget: slots of one request.
        num_logical_blocks: N.
        max_num_seqs: most requests in a batch.
        counters: this worker's shared counters.

    Raises:
        ConfigError: host memory cannot be had, or an option does not fit the model.
    """
    groups = shape.layer_groups(config.layer_groups)
    anchors = shape.anchor_layers(config.anchor_layers, groups)
    engine = _engine(PageLayout(caches, groups), num_logical_blocks, config, shape.device)
    geometry = Geometry(num_logical_blocks, engine.layout.num_slots, config.layer_groups, shape.block_size)
    index_geometry = _geometry(config, shape, num_logical_blocks, shape.device)
    selector = create_selector(config.selector, index_geometry, **_options(config))
    width = -(-budget.max_model_len // shape.block_size) + 1
    return ResidencyRuntime(
        RuntimeParts(
            shape=shape,
            groups=groups,
            anchors=anchors,
            planner=StepPlanner(
                geometry, budget, config.tau_steps, -inf if config.score_threshold is None else config.score_threshold
            ),
            engine=engine,
            page_format=page_format,
            selector=selector,
            selections=SelectionQueue(selector, config.selection_delay_steps),
            tables=StepTables(config.layer_groups, max_num_seqs, width, shape.device),
            queries=QueryBuffer(len(anchors), max_num_seqs, shape),
            prefill=_prefill(engine, page_format, shape, attend, config),
            counters=counters,
            check_integrity=config.check_integrity,
            poison=config.poison_free_slots,
        )
    )


def _prefill(
    engine: TransferEngine,
    page_format: PageFormat,
    shape: AttentionShape,
    attend: PartialAttention,
    config: FlashMemoryConfig,
) -> StreamedPrefill:
    layout = engine.layout
    page_elems = layout.page_view(0).shape[1]
    staging = torch.zeros((2, config.staging_blocks, page_elems), dtype=layout.dtype, device=layout.device)
    return StreamedPrefill(
        engine,
        page_format,
        (staging[0], staging[1]),
        shape.softmax_scale,
        attend,
        poison=config.poison_free_slots,
    )


def _engine(layout: PageLayout, num_blocks: int, config: FlashMemoryConfig, device: torch.device) -> TransferEngine:
    if device.type != "cuda":
        return CpuTransferEngine(layout, HostPool(num_blocks, layout))
    from flashmemory_vllm.transfer.cuda_engine import CudaTransferEngine

    return CudaTransferEngine(layout, HostPool(num_blocks, layout, pin=config.pin_host_memory))


def _geometry(config: FlashMemoryConfig, shape: AttentionShape, num_blocks: int, device: torch.device) -> IndexGeometry:
    groups = shape.layer_groups(config.layer_groups)
    anchors = shape.anchor_layers(config.anchor_layers, groups)
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


def _options(config: FlashMemoryConfig) -> dict[str, object]:
    """The selector's options among ours; each carries the name of the configuration field it comes from."""
    return {name: getattr(config, name) for name in option_names(config.selector)}
