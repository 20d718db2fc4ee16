"""What backends of latent attention share: a batch in two runs, queries with absorbed projections.

Decode rows are attended to with the projection of keys absorbed in their queries, prefill rows with keys and values
made of latents. Our own attention over streamed history and all selectors take the first form for both.
"""

from typing import TYPE_CHECKING, Any

import torch

from flashmemory_vllm.plugin.backends.common import BoundImpl, CompactedBuilder

if TYPE_CHECKING:
    from flashmemory_vllm.runtime.runtime import ResidencyRuntime


class LatentBuilder(CompactedBuilder):
    """Mixin before a metadata builder of latent attention."""

    # Some platforms' take up to 512 tokens for decode: a chunk of a prompt would be attended to over a resident set
    reorder_batch_threshold: int = 1
    _prefill_backend: Any

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], *args: Any, **kwargs: Any) -> None:
        """As the platform's, which does not keep the names of its layers."""
        super().__init__(kv_cache_spec, layer_names, *args, **kwargs)  # type: ignore[call-arg]
        self.layer_names = layer_names
        self._prefill_backends = [self._prefill_backend]

    def begin_group(self, group: int) -> None:
        """Give each layer group its own backend of prefill, which keeps the metadata that it was built for."""
        while len(self._prefill_backends) <= group:
            self._prefill_backends.append(self._prefill_backends[0].clone())
        self._prefill_backend = self._prefill_backends[group]


class LatentImpl(BoundImpl):
    """Mixin before an implementation of latent attention: feeds the runtime and picks the layer group's metadata.

    VLLM calls `forward_mha` for the rows in prefill, which are the last ones of a batch, and then `forward_mqa` for the
    others. A row of one token counts as one of those, also where it is a prompt's last.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    _layer: Any

    def bind(self, layer: torch.nn.Module, runtime: "ResidencyRuntime", layer_index: int, group: int) -> None:
        """As every layer; its projections are needed as well."""
        super().bind(layer, runtime, layer_index, group)
        self._layer = layer

    def forward_mha(
        self,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: Any,
        k_scale: torch.Tensor,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
    ) -> None:
        """As the platform's, over the layer group's resident blocks; streamed rows are completed afterwards.

        Args:
            q: [T, Hq, nope + rope].
            kv_c_normed: [T, latent].
            k_pe: [T, 1, rope].
            kv_c_and_k_pe_cache: [S, block_size, latent + rope].
            attn_metadata: the platform's, of group 0.
            k_scale: of a quantised cache.
            output: [T, Hq * v], written.
            output_scale: of a quantised output.
        """
        metadata = self.own_metadata(attn_metadata)
        super().forward_mha(  # type: ignore[misc]
            q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, metadata, k_scale, output, output_scale
        )
        if not self._is_heard(attn_metadata):
            return
        assert self.runtime is not None
        query, key = self.absorbed(q), torch.cat((kv_c_normed.unsqueeze(1), k_pe), dim=-1)
        latents = query.new_empty(*query.shape[:2], self.kv_lora_rank)
        values = key[..., : self.kv_lora_rank]
        first = attn_metadata.num_decode_tokens
        for tokens in self.runtime.attended(self.layer_index, query, key, values, latents, first):
            output[tokens] = self.values_of(latents[tokens]).flatten(1)

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: Any,
        layer: torch.nn.Module,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the platform's, likewise.

        Args:
            q: [T, Hq, latent + rope], or its two parts.
            kv_c_and_k_pe_cache: [S, block_size, latent + rope].
            attn_metadata: the platform's, of group 0.
            layer: vLLM's.

        Returns:
            Latents [T, Hq, latent], and what the platform's returns beside them.
        """
        metadata = self.own_metadata(attn_metadata)
        latents, lse = super().forward_mqa(q, kv_c_and_k_pe_cache, metadata, layer)  # type: ignore[misc]
        if self._is_heard(attn_metadata):
            assert self.runtime is not None
            query = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
            # What has just been written; tokens of padding were not
            slots = self.runtime.slot_mapping(self.group, len(query)).clamp(min=0)
            key = kv_c_and_k_pe_cache.flatten(0, 1)[slots].unsqueeze(1)
            self.runtime.attended(self.layer_index, query, key, key[..., : self.kv_lora_rank], latents)
        return latents, lse

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
    ) -> None:
        """As the platform's, into the slots of this layer's group."""
        slots = self.own_slots(slot_mapping)
        super().do_kv_cache_update(kv_c_normed, k_pe, kv_cache, slots, kv_cache_dtype, k_scale)  # type: ignore[misc]

    def _is_heard(self, attn_metadata: Any) -> bool:
        return self.is_watched(attn_metadata) and self.runtime is not None and self.runtime.is_heard(self.layer_index)

    def absorbed(self, query: torch.Tensor) -> torch.Tensor:
        """Queries [T, Hq, latent + rope] for latents, of queries [T, Hq, nope + rope] for keys."""
        nope, rope = query[..., : self.qk_nope_head_dim], query[..., self.qk_nope_head_dim :]
        return torch.cat((self.by_head(nope, is_key=True), rope), dim=-1)

    def values_of(self, latents: torch.Tensor) -> torch.Tensor:
        """What attention gives, [T, Hq, v], of the latents [T, Hq, latent] that it was computed with."""
        return self.by_head(latents, is_key=False)

    def by_head(self, vectors: torch.Tensor, *, is_key: bool) -> torch.Tensor:
        """Each head's vectors [T, Hq, n] times its projection of keys or of values, [T, Hq, m]."""
        weights = self._layer.W_UK_T if is_key else self._layer.W_UV
        return torch.bmm(vectors.transpose(0, 1), weights).transpose(0, 1)
