"""What cannot be served correctly: options of vLLM and models, named as the user named them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from vllm.platforms import current_platform
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE, resolve_kv_cache_dtype_string

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.errors import UnsupportedError
from flashmemory_vllm.plugin.latent import unserved_latents
from flashmemory_vllm.plugin.models import (
    describe_differences,
    is_state_beside_full_attention,
    is_window_beside_full_attention,
    layer_sizes,
)
from flashmemory_vllm.plugin.names import CAPTURE_EXTENSION

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

# What vLLM takes for --kv-cache-dtype that is not quantised
_PLAIN_DTYPES = ("float16", "bfloat16")


class Refusal(NamedTuple):
    """One thing that may be refused.

    Attributes:
        refused: whether it is.
        option: what the user gave it with.
        given: what was given.
        allowed: what would be served.
    """

    refused: bool
    option: str
    given: object
    allowed: str


def refuse_unsupported(vllm_config: "VllmConfig", config: FlashMemoryConfig) -> None:
    """Refuse every engine option, and every model, that this plugin cannot serve correctly.

    Args:
        vllm_config: vLLM's configuration. What vLLM derives from an option only later is asked for by the option.
        config: our options.

    Raises:
        UnsupportedError: names the option, what was given and what is allowed.
    """
    for refused, option, given, allowed in _refusals(vllm_config, config):
        if refused:
            raise UnsupportedError(
                f"{option}: {given} is not supported with --attention-backend flashmemory; allowed: {allowed}"
            )


def _refusals(vllm_config: "VllmConfig", config: FlashMemoryConfig) -> Iterator[Refusal]:
    yield from _option_refusals(vllm_config)
    yield from _parallel_refusals(vllm_config.parallel_config, config)
    yield from _machine_refusals(vllm_config.parallel_config)
    model = vllm_config.model_config
    if model is not None:
        yield from _model_refusals(model)
        yield from _latent_refusals(vllm_config, config, model)
        disabled = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
        beside = is_window_beside_full_attention(model) or is_state_beside_full_attention(model)
        one_for_all = bool(disabled) and beside
        allowed = "unset, for windows or states beside full attention"
        yield Refusal(one_for_all, "--disable-hybrid-kv-cache-manager", disabled, allowed)
        yield from _cache_dtype_refusals(vllm_config, model)
        # Only now: of a model without attention there is nothing to ask
        differences = describe_differences(layer_sizes(model, vllm_config.parallel_config))
        given = f"{model.model} ({differences})"
        yield Refusal(bool(differences), "model", given, "the same heads and head size in every attention layer")


def _option_refusals(vllm_config: "VllmConfig") -> Iterator[Refusal]:
    cache, attention = vllm_config.cache_config, vllm_config.attention_config
    # Later vLLM makes a KV connector of it
    offloading = cache.kv_offloading_size
    in_host = "unset: KV blocks are in host memory already, flashmemory.host_memory_gib is how much of it"
    yield Refusal(offloading is not None, "--kv-offloading-size", offloading, in_host)
    yield Refusal(vllm_config.kv_transfer_config is not None, "--kv-transfer-config", "set", "no KV connector")
    yield _speculative_refusal(vllm_config)
    hisparse = attention.hisparse_config is not None
    yield Refusal(hisparse, "--attention-config.hisparse_config", "set", "no HiSparse")
    kinds = ", ".join(attention.backend_per_kind)
    yield Refusal(bool(kinds), "--attention-config.backend_per_kind", kinds, "unset: one backend for all layers")
    yield Refusal(attention.use_non_causal, "--attention-config.use_non_causal", True, "causal attention")
    yield Refusal(bool(cache.kv_sharing_fast_prefill), "--kv-sharing-fast-prefill", True, "off")
    # A ledger that is asked for a prompt's first chunk alone does not know how long a resumed request is
    by_chunk = not vllm_config.scheduler_config.scheduler_reserve_full_isl
    yield Refusal(by_chunk, "--no-scheduler-reserve-full-isl", "given", "unset: admitted by the whole prompt")
    diffuses = vllm_config.diffusion_config is not None
    yield Refusal(diffuses, "--diffusion-config", "decoding by diffusion", "autoregressive decoding")
    yield Refusal(vllm_config.aux_output_config.enabled, "--enable-return-routed-experts", True, "off")


def _speculative_refusal(vllm_config: "VllmConfig") -> Refusal:
    speculative = vllm_config.speculative_config
    given = getattr(speculative, "method", None)
    drafter = getattr(speculative, "model", None)
    if drafter is not None and drafter != given:
        # vLLM makes the option itself for a --model that is a speculator
        given = f"{given} with {drafter}"
    allowed = "no speculative decoding, by --spec-method or a speculator as --model neither"
    return Refusal(speculative is not None, "--speculative-config", given, allowed)


def _parallel_refusals(parallel: "ParallelConfig", config: FlashMemoryConfig) -> Iterator[Refusal]:
    yield _more_than_one("--decode-context-parallel-size", parallel.decode_context_parallel_size)
    yield _more_than_one("--prefill-context-parallel-size", parallel.prefill_context_parallel_size)
    yield _more_than_one("--pipeline-parallel-size", parallel.pipeline_parallel_size)
    yield Refusal(bool(parallel.enable_dbo), "--enable-dbo", True, "dual batch overlap off")
    yield _more_than_one("--ubatch-size", parallel.ubatch_size)
    ranks = parallel.tensor_parallel_size
    # The scheduler decides by the slots of all ranks, each worker by its own
    pressure = ranks > 1 and config.mode == "pressure"
    yield Refusal(pressure, "flashmemory.mode", f"pressure with {ranks} ranks", "always, or one rank")
    # It reads all heads, of which a rank has only some
    indexer = ranks > 1 and config.indexer is not None
    yield Refusal(indexer, "flashmemory.indexer", f"{config.indexer} with {ranks} ranks", "one rank, or unset")


def _machine_refusals(parallel: "ParallelConfig") -> Iterator[Refusal]:
    """Several machines are not tested: counters, and the slots that the scheduler reads there, are files of one."""
    local, engines = parallel.data_parallel_size_local, parallel.data_parallel_size
    yield Refusal(parallel.nnodes > 1, "--nnodes", parallel.nnodes, "1; on several machines one server each")
    # Engines that are servers of their own do not know how many share the host memory
    allowed = "--data-parallel-size alone, with all engines on one machine"
    external = parallel.data_parallel_external_lb
    yield Refusal(external, "--data-parallel-external-lb", "set, or by --data-parallel-rank", allowed)
    yield Refusal(parallel.data_parallel_hybrid_lb, "--data-parallel-hybrid-lb", "set", allowed)
    yield Refusal(local != engines, "--data-parallel-size-local", f"{local} of {engines} engines", allowed)
    # Where these put their ranks is not known before they have
    ray, executor = parallel.data_parallel_backend == "ray", parallel.distributed_executor_backend
    yield Refusal(ray, "--data-parallel-backend", "ray", "mp")
    spreads = executor in {"ray", "external_launcher"}
    yield Refusal(spreads, "--distributed-executor-backend", executor, "mp or uni")


def _more_than_one(option: str, size: int) -> Refusal:
    return Refusal(size > 1, option, size, "1")


def _latent_refusals(vllm_config: "VllmConfig", config: FlashMemoryConfig, model: "ModelConfig") -> Iterator[Refusal]:
    """What is not served of models with latent attention, on the platform at hand."""
    kind, allowed = unserved_latents(model, is_cpu=current_platform.is_cpu()) or ("", "")
    yield Refusal(bool(kind), "model", f"{model.model} ({kind})", allowed)
    if not model.use_mla:
        return
    ranks, indexer = vllm_config.parallel_config.tensor_parallel_size, config.indexer
    # Each would keep all latents in host memory of its own
    yield Refusal(ranks > 1, "--tensor-parallel-size", f"{ranks} with latent attention", "1")
    given = f"{indexer} with latent attention"
    yield Refusal(indexer is not None, "flashmemory.indexer", given, "unset: no indexer was trained for latents")
    # A recorder wants the queries and keys of a whole batch
    is_recorded = vllm_config.parallel_config.worker_extension_cls == CAPTURE_EXTENSION
    yield Refusal(is_recorded, "model", f"{model.model} (latent attention, to be recorded)", "plain full attention")


def _model_refusals(model: "ModelConfig") -> Iterator[Refusal]:
    window, chunk = model.get_sliding_window(), model.attention_chunk_size
    yield Refusal(model.runner_type != "generate", "--runner", model.runner_type, "generate")
    unnamed = model.is_hybrid and not is_state_beside_full_attention(model)
    kinds = {
        "states beside attention, in layers whose kinds it does not tell": unnamed,
        "no attention": model.is_attention_free,
        "encoder-decoder": model.is_encoder_decoder,
        "ALiBi position biases": model.uses_alibi,
        "attention in both directions over images": model.is_mm_prefix_lm,
        "dual chunk attention": getattr(model.hf_config, "dual_chunk_attention_config", None) is not None,
        f"reference sliding window of {model.rswa_window} tokens": model.rswa_window is not None,
        f"attention in chunks of {chunk} tokens": chunk is not None,
    }
    allowed = "decoder-only models with plain full attention in every layer"
    for kind, refused in kinds.items():
        yield Refusal(bool(refused), "model", f"{model.model} ({kind})", allowed)
    given = f"{model.model} (sliding window of {window} tokens)"
    no_window = f"{allowed}, or --disable-sliding-window for requests no longer than that"
    only_windows = window is not None and not is_window_beside_full_attention(model)
    yield Refusal(only_windows, "model", given, no_window)


def _cache_dtype_refusals(vllm_config: "VllmConfig", model: "ModelConfig") -> Iterator[Refusal]:
    given, own = vllm_config.cache_config.cache_dtype, str(model.dtype).removeprefix("torch.")
    scheme = getattr(vllm_config.quant_config, "kv_cache_scheme", None)
    # With a scheme each attention layer turns "auto" into fp8, as it is made
    announced = resolve_kv_cache_dtype_string("auto", model) if scheme is None else "fp8"
    can_be_given = own in _PLAIN_DTYPES
    remedy = f"--kv-cache-dtype {own}" if can_be_given else "--dtype bfloat16 with --kv-cache-dtype bfloat16"
    yield Refusal(
        announced != "auto" and given in {"auto", announced},
        "model",
        f"{model.model} (a checkpoint that asks for a KV cache of {announced})",
        f"{remedy}, which leaves its KV scales unused",
    )
    differs = given != "auto" and STR_DTYPE_TO_TORCH_DTYPE.get(given) != model.dtype
    allowed = f"auto or {own}, the model's dtype" if can_be_given else f"auto, which is {own}, the model's dtype"
    yield Refusal(differs, "--kv-cache-dtype", given, allowed)
