"""Models with latent attention: what vLLM's CPU platform takes from them, and which of them are served."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.attention.backend import AttentionBackend

# Families whose layers were shown to be served as vLLM serves them
SHOWN = ("deepseek_v2", "deepseek_v3", "kimi_k2")
# Of keys and of the latents within them, the only ones that vLLM's CPU kernel is compiled for
CPU_SIZES = (576, 512)


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
    if not model.use_mla:
        return None
    kind, config = "multi-head latent attention", model.hf_text_config
    if not is_cpu:
        return f"{kind} on a GPU", "latent attention on a CPU, or plain full attention"
    if config.model_type not in SHOWN or hasattr(config, "index_topk") or hasattr(config, "compress_ratios"):
        return f"{kind} of a {config.model_type}", f"that of {', '.join(SHOWN)}, without an indexer of its own"
    sizes = model.get_head_size(), config.kv_lora_rank
    if sizes != CPU_SIZES:
        given = f"{kind} with keys of {sizes[0]} elements, {sizes[1]} of them the latent"
        return given, "on a CPU {} elements, {} of them the latent".format(*CPU_SIZES)
    return None
