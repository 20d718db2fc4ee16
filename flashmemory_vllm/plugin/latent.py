"""Models with latent attention: what vLLM's CPU platform takes from them, and which of them are served."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from flashmemory_vllm.kinds.latents import unserved

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.attention.backend import AttentionBackend


def runs_on_amx(model: "ModelConfig") -> bool:
    """Whether a CPU's attention to latents is that on AMX tiles, which takes bf16 alone."""
    return model.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def cpu_backend(model: "ModelConfig | None") -> "type[AttentionBackend]":
    """VLLM's backend that a CPU attends with, over whose blocks ours does."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.mla.amx_mla import AMXMLABackend
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

    if model is None or not model.use_mla:
        return CPUAttentionBackend
    return AMXMLABackend if runs_on_amx(model) else CPUMLABackend


def keep_chunks_and_prefixes(vllm_config: "VllmConfig") -> Callable[[], None]:
    """Keep what is asked for of chunked prefill and prefix caching, which a CPU's platform switches off.

    Symptom: without AMX vLLM's CPU platform has every prompt of a model with latent attention computed at once and
    without prefix hits, for it has not tried them. Cure: put back what was asked for, as soon as it is done; its
    implementation attends to earlier tokens as those on other platforms do, by the same code.
    Remove when the platform leaves these options alone.

    Returns:
        What puts them back.
    """
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    asked = scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens, cache.enable_prefix_caching

    def put_back() -> None:
        scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens, cache.enable_prefix_caching = asked

    return put_back


def nothing_to_put_right() -> None:
    """Of a model whose options the platform leaves alone."""


def unserved_latents(model: "ModelConfig", *, is_cpu: bool) -> tuple[str, str] | None:
    """Why a model with latent attention is not served, in words, and what is allowed; None if it is.

    Args:
        model: vLLM's configuration of the model.
        is_cpu: the platform is a CPU.
    """
    return unserved(model.hf_text_config, is_cpu=is_cpu) if model.use_mla else None
