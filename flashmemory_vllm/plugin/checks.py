"""What flashmemory refuses, decided on the VllmConfig before any model is loaded."""

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.platforms import current_platform

from flashmemory_vllm.config import SECTION, FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError, UnsupportedError
from flashmemory_vllm.indexer.checkpoint import check_indexer, fetched_commit, resolve_indexer
from flashmemory_vllm.plugin import sizing
from flashmemory_vllm.plugin.compat import check_vllm_version
from flashmemory_vllm.plugin.counter_files import announce_engine
from flashmemory_vllm.plugin.names import BACKEND_NAME, CPU_WORKER, CUDA_WORKER
from flashmemory_vllm.plugin.seams import check_seams

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# vLLM sets up handlers for the names below its own only.
logger = init_logger("vllm.flashmemory")

CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32")


def is_selected(vllm_config: "VllmConfig") -> bool:
    """Whether this engine runs the flashmemory backend."""
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.name == BACKEND_NAME


def read_config(vllm_config: "VllmConfig") -> FlashMemoryConfig:
    """Our validated options of this engine, from `--additional-config`.

    Raises:
        ConfigError: an option is unknown, ill-typed or out of range.
    """
    additional = vllm_config.additional_config
    return FlashMemoryConfig.from_additional_config(additional if isinstance(additional, dict) else {})


def prepare_config(vllm_config: "VllmConfig") -> None:
    """Validate the engine's configuration and choose our worker; does nothing for other backends.

    Args:
        vllm_config: vLLM's configuration, in the process that builds it. `parallel_config.worker_cls` is set.

    Raises:
        ConfigError: one of our options, or `--worker-cls`, is wrong.
        UnsupportedError: a combination this plugin does not serve correctly.
    """
    if not is_selected(vllm_config):
        return
    check_vllm_version()
    check_seams()
    config = read_config(vllm_config)
    refuse_unsupported(vllm_config)
    _pin_indexer(vllm_config, config)
    choose_worker(vllm_config)
    announce_engine(vllm_config)


def check_sizes(vllm_config: "VllmConfig") -> None:
    """Refuse what cannot hold one request of the longest length, and an indexer that does not fit the model.

    Does nothing for other backends.

    Args:
        vllm_config: vLLM's configuration, with the block size that the platform has chosen.

    Raises:
        ConfigError: slots or host memory are too few, or more than there are; the indexer cannot be read, is damaged,
            or belongs to another model or block size.
    """
    if is_selected(vllm_config) and vllm_config.model_config is not None:
        config = read_config(vllm_config)
        sizing.check_capacity(vllm_config, config)
        _check_indexer(config)


def _pin_indexer(vllm_config: "VllmConfig", config: FlashMemoryConfig) -> None:
    """Fetch an indexer from the Hub here, once, and let all other processes use the commit that was found.

    Raises:
        ConfigError: there is no such indexer.
    """
    if config.indexer is None:
        return
    commit = fetched_commit(resolve_indexer(config.indexer, config.indexer_revision))
    if commit is not None:
        # The mapping may be the user's own
        options = {**vllm_config.additional_config[SECTION], "indexer_revision": commit}
        vllm_config.additional_config = {**vllm_config.additional_config, SECTION: options}


def _check_indexer(config: FlashMemoryConfig) -> None:
    """Read every weight of the indexer, if there is one, and say if it was trained for another `tau_steps`.

    Raises:
        ConfigError: it cannot be read or is damaged.
    """
    if config.indexer is None:
        return
    trained = check_indexer(resolve_indexer(config.indexer, config.indexer_revision)).tau
    if config.tau(trained) != trained:
        logger.warning_once(
            "flashmemory.tau_steps is %d, but the indexer %s was trained for %d: it then scores for another number of "
            "steps than its selections are in force. Leave flashmemory.tau_steps unset, or set it to %d",
            config.tau(trained),
            config.indexer,
            trained,
            trained,
        )


def choose_worker(vllm_config: "VllmConfig") -> None:
    """Set our worker class for the platform.

    Raises:
        ConfigError: `--worker-cls` names another class.
        UnsupportedError: the platform is neither CUDA nor CPU.
    """
    if current_platform.is_cuda():
        worker = CUDA_WORKER
    elif current_platform.is_cpu():
        worker = CPU_WORKER
    else:
        raise UnsupportedError(f"platform: {current_platform.device_name} is not supported; allowed: cuda, cpu")
    given = vllm_config.parallel_config.worker_cls
    if given not in ("auto", worker):
        raise ConfigError(f"--worker-cls: {given} conflicts with --attention-backend flashmemory, which sets {worker}")
    vllm_config.parallel_config.worker_cls = worker


def refuse_unsupported(vllm_config: "VllmConfig") -> None:
    """Refuse every engine option that this plugin cannot serve correctly.

    Raises:
        UnsupportedError: names the option, what was given and what is allowed.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    speculative = vllm_config.speculative_config
    refusals = [
        (vllm_config.kv_transfer_config is not None, "--kv-transfer-config", "set", "no KV connector"),
        (
            speculative is not None,
            "--speculative-config",
            getattr(speculative, "method", None),
            "no speculative decoding",
        ),
        _more_than_one("--decode-context-parallel-size", parallel.decode_context_parallel_size),
        _more_than_one("--prefill-context-parallel-size", parallel.prefill_context_parallel_size),
        _more_than_one("--pipeline-parallel-size", parallel.pipeline_parallel_size),
        (bool(parallel.use_ubatching), "--enable-dbo", True, "dual batch overlap off"),
        (vllm_config.attention_config.hisparse_config is not None, "hisparse_config", "set", "no HiSparse"),
        (
            cache.cache_dtype not in CACHE_DTYPES,
            "--kv-cache-dtype",
            cache.cache_dtype,
            ", ".join(CACHE_DTYPES),
        ),
        (bool(cache.kv_sharing_fast_prefill), "--kv-sharing-fast-prefill", True, "off"),
    ]
    ranks, config = parallel.tensor_parallel_size, read_config(vllm_config)
    if ranks > 1 and config.mode == "pressure":
        # The scheduler decides by the slots of all ranks, each worker by its own
        refusals.append((True, "flashmemory.mode", f"pressure with {ranks} ranks", "always, or one rank"))
    if ranks > 1 and config.indexer is not None:
        # It reads all heads, of which a rank has only some
        refusals.append((True, "flashmemory.indexer", f"{config.indexer} with {ranks} ranks", "one rank, or unset"))
    if vllm_config.model_config is not None:
        refusals += _model_refusals(vllm_config.model_config)
    for refused, option, given, allowed in refusals:
        if refused:
            raise UnsupportedError(
                f"{option}: {given} is not supported with --attention-backend flashmemory; allowed: {allowed}"
            )


def _more_than_one(option: str, size: int) -> tuple[bool, str, object, str]:
    return size > 1, option, size, "1"


def _model_refusals(model: "ModelConfig") -> list[tuple[bool, str, object, str]]:
    window, chunk = model.get_sliding_window(), model.attention_chunk_size
    kinds = {
        "multi-head latent attention": model.use_mla,
        "hybrid attention and state-space layers": model.is_hybrid,
        "no attention": model.is_attention_free,
        "encoder-decoder": model.is_encoder_decoder,
        "ALiBi position biases": model.uses_alibi,
        f"sliding window of {window} tokens": window is not None,
        f"attention in chunks of {chunk} tokens": chunk is not None,
    }
    allowed = "decoder-only models with plain full attention in every layer"
    refusals = [(bool(refused), "model", f"{model.model} ({kind})", allowed) for kind, refused in kinds.items()]
    return [(model.runner_type != "generate", "--runner", model.runner_type, "generate"), *refusals]
