"""Which models with latent attention are served, by what their configurations say."""

from typing import Any

# Families whose layers were shown to be served as vLLM serves them
SHOWN = ("deepseek_v2", "deepseek_v3", "kimi_k2")
# Of keys and of the latents within them, the only ones that vLLM's CPU kernel is compiled for
CPU_SIZES = (576, 512)
NAME = "multi-head latent attention"


def unserved(config: Any, *, is_cpu: bool) -> tuple[str, str] | None:  # noqa: ANN401 - Transformers has no type of it
    """Why a model with latent attention is not served, in words, and what is allowed; None if it is.

    Args:
        config: the configuration of its text model: what it names is an attribute.
        is_cpu: the platform is a CPU.
    """
    if not is_cpu:
        return f"{NAME} on a GPU", "latent attention on a CPU, or plain full attention"
    if config.model_type not in SHOWN or hasattr(config, "index_topk") or hasattr(config, "compress_ratios"):
        return f"{NAME} of a {config.model_type}", f"that of {', '.join(SHOWN)}, without an indexer of its own"
    sizes = config.kv_lora_rank + config.qk_rope_head_dim, config.kv_lora_rank
    if sizes != CPU_SIZES:
        given = f"{NAME} with keys of {sizes[0]} elements, {sizes[1]} of them the latent"
        return given, "on a CPU {} elements, {} of them the latent".format(*CPU_SIZES)
    return None
