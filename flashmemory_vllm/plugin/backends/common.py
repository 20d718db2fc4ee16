"""What the platforms' backends share: compacted metadata, query capture and streamed history."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from flashmemory_vllm.errors import IntegrityError, UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from flashmemory_vllm.runtime.runtime import ResidencyRuntime
    from flashmemory_vllm.runtime.tables import CompactedTable

STEP_METADATA = "flashmemory"


@dataclass(frozen=True, slots=True, eq=False)
class StepMetadata:
    """What our implementation finds in the platform's metadata, under the attribute `STEP_METADATA`.

    Attributes:
        groups: the platform's metadata for each layer group.
    """

    groups: Sequence[Any]


class CompactedBuilder:
    """Mixin before a metadata builder: attention sees compacted block tables of device slots.

    vLLM builds metadata from logical block ids and logical lengths. During a step of the residency runtime both
    are replaced by its tables. Outside of one (warm-up, graph capture, dummy batches) block ids are slots already,
    but the metadata still names the runtime's tensors: a graph captured with it replays on what later steps put
    there. Before there is a runtime (profiling), nothing changes.
    """

    # V1 would otherwise put the raw logical table into metadata that it builds for a second group.
    supports_update_block_table: bool = False
    vllm_config: "VllmConfig"
    layer_names: list[str]

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: "CommonAttentionMetadata",
        fast_build: bool = False,
    ) -> Any:
        """Build the platform's metadata, one per layer group; group 0's carries the others.

        Raises:
            IntegrityError: a step has more rows than the runtime's tables: its block ids would be taken for slots.
        """
        runtime = runtime_of(self.vllm_config, self.layer_names[0])
        if runtime is None or _is_too_large(runtime, common_attn_metadata.num_reqs):
            return super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        built = []
        for group, table in enumerate(_tables(runtime, common_attn_metadata)):
            compacted = replace(
                common_attn_metadata,
                block_table_tensor=table.block_table,
                seq_lens=table.seq_lens,
                seq_lens_cpu_upper_bound=table.seq_lens_host,
                max_seq_len=table.max_seq_len,
            )
            self.begin_group(group)
            built.append(super().build(common_prefix_len, compacted, fast_build))  # type: ignore[misc]
        setattr(built[0], STEP_METADATA, StepMetadata(built))
        return built[0]

    def begin_group(self, group: int) -> None:
        """Called before the metadata of each layer group is built; for state that groups must not share."""


def _is_too_large(runtime: "ResidencyRuntime", num_rows: int) -> bool:
    """Whether a batch outside of a step has more rows than the runtime's tables."""
    if runtime.in_step and num_rows > runtime.max_rows:
        raise IntegrityError(f"a step has {num_rows} rows, allowed are --max-num-seqs and padding: {runtime.max_rows}")
    return num_rows > runtime.max_rows


def _tables(runtime: "ResidencyRuntime", common: "CommonAttentionMetadata") -> "list[CompactedTable]":
    if runtime.in_step:
        return runtime.compacted_tables(common.num_reqs)
    return runtime.physical_tables(common.block_table_tensor, common.seq_lens, common.slot_mapping, common.max_seq_len)


class BoundImpl:
    """What implementations of every kind of attention share: the runtime, and which layer and group of it this one is.

    A layer that is never bound to a runtime is a native one, and does what the platform's does.
    """

    runtime: "ResidencyRuntime | None" = None
    layer_index: int = -1
    group: int = 0

    def bind(self, layer: torch.nn.Module, runtime: "ResidencyRuntime", layer_index: int, group: int) -> None:  # noqa: ARG002
        """Attach this layer to the worker's runtime.

        Args:
            layer: vLLM's, whose implementation this is.
            runtime: the worker's.
            layer_index: its place among the managed layers.
            group: its layer group.
        """
        self.runtime, self.layer_index, self.group = runtime, layer_index, group

    def is_watched(self, attn_metadata: Any) -> bool:
        """Whether the runtime is to know what this layer attends to: it has built the metadata."""
        return self.runtime is not None and hasattr(attn_metadata, STEP_METADATA)

    def own_metadata(self, attn_metadata: Any) -> Any:
        """The platform's metadata for this layer's group, of what vLLM hands to all layers."""
        step: StepMetadata | None = getattr(attn_metadata, STEP_METADATA, None)
        return attn_metadata if step is None else step.groups[self.group]

    def own_slots(self, slot_mapping: torch.Tensor) -> torch.Tensor:
        """The slot mapping [T] of this layer's group, of what vLLM hands to all layers: that of group 0."""
        if self.runtime is not None and self.group:
            return self.runtime.slot_mapping(self.group, len(slot_mapping))
        return slot_mapping


class ResidentImpl(BoundImpl):
    """Mixin before an attention implementation: feeds the runtime and picks the layer group's metadata."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As the platform's implementation; refuses what compaction would silently get wrong.

        Raises:
            UnsupportedError: ALiBi, soft-capped logits, cross-layer KV sharing, or no decoder layer, in a layer
                without a window.
        """
        super().__init__(*args, **kwargs)
        if getattr(self, "sliding_window", None) not in {None, -1, (-1, -1)}:
            return  # a native layer: its tables are never compacted
        refusals = {
            "ALiBi position biases": getattr(self, "alibi_slopes", None) is not None,
            "logit soft-capping": bool(getattr(self, "logits_soft_cap", 0)),
            "KV shared between layers": getattr(self, "kv_sharing_target_layer_name", None) is not None,
            "attention other than causal decoder self-attention": getattr(self, "attn_type", "decoder") != "decoder",
        }
        for what, refused in refusals.items():
            if refused:
                raise UnsupportedError(
                    f"model: an attention layer uses {what}; "
                    "allowed with --attention-backend flashmemory: causal full attention"
                )

    def forward(  # noqa: PLR0913, PLR0917 - vLLM's signature
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the platform's, over the layer group's resident blocks; streamed rows are completed afterwards."""
        metadata = self.own_metadata(attn_metadata)
        result: torch.Tensor = super().forward(  # type: ignore[misc]
            layer, query, key, value, kv_cache, metadata, output, output_scale, output_block_scale
        )
        if self.is_watched(attn_metadata):
            assert self.runtime is not None
            self.runtime.attended(self.layer_index, query, key, value, output)
        return result

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """As the platform's, into the slots of this layer's group."""
        super().do_kv_cache_update(layer, key, value, kv_cache, self.own_slots(slot_mapping))  # type: ignore[misc]


def runtime_of(vllm_config: "VllmConfig", layer_name: str) -> "ResidencyRuntime | None":
    """The runtime that a layer of this engine is bound to; None before the KV cache exists."""
    layer = vllm_config.compilation_config.static_forward_context[layer_name]
    runtime: ResidencyRuntime | None = layer.impl.runtime
    return runtime
