"""What flashmemory refuses, decided on the VllmConfig before any model is loaded."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.platforms import current_platform

from flashmemory_vllm.config import SECTION, FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError, UnsupportedError
from flashmemory_vllm.indexer.checkpoint import check_indexer, fetched_commit, resolve_indexer
from flashmemory_vllm.plugin import sizing
from flashmemory_vllm.plugin.compat import check_vllm_version
from flashmemory_vllm.plugin.compat_outputs import raise_failed_requests
from flashmemory_vllm.plugin.counter_files import announce_engine
from flashmemory_vllm.plugin.latent import cpu_backend, keep_chunks_and_prefixes, nothing_to_put_right
from flashmemory_vllm.plugin.machine import tell_engines_of_machine
from flashmemory_vllm.plugin.models import ignore_windows_that_never_bind
from flashmemory_vllm.plugin.names import BACKEND_NAME, CPU_WORKER, CUDA_WORKER
from flashmemory_vllm.plugin.refusals import refuse_unsupported
from flashmemory_vllm.plugin.seams import check_seams

if TYPE_CHECKING:
    from vllm.config import CacheConfig, ModelConfig, VllmConfig

# vLLM sets up handlers for the names below its own only.
logger = init_logger("vllm.flashmemory")


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


def prepare_config(vllm_config: "VllmConfig") -> Callable[[], None]:
    """Validate the engine's configuration and choose our worker; does nothing for other backends.

    Args:
        vllm_config: vLLM's configuration, in the process that builds it. `parallel_config.worker_cls` is set.

    Returns:
        What is to be done as soon as the platform has checked the configuration, too.

    Raises:
        ConfigError: one of our options, or `--worker-cls`, is wrong.
        UnsupportedError: a combination this plugin does not serve correctly.
    """
    if not is_selected(vllm_config):
        return nothing_to_put_right
    is_latent = vllm_config.model_config is not None and vllm_config.model_config.use_mla
    check_vllm_version()
    check_seams(is_latent=is_latent)
    config = read_config(vllm_config)
    if ignore_windows_that_never_bind(vllm_config):
        logger.info_once("flashmemory: no request is longer than the model's sliding window, which is ignored")
    take_smallest_blocks(vllm_config.cache_config, vllm_config.model_config)
    refuse_unsupported(vllm_config, config)
    _pin_indexer(vllm_config, config)
    _tell_options(vllm_config)
    choose_worker(vllm_config)
    tell_engines_of_machine(vllm_config)
    raise_failed_requests()
    announce_engine(vllm_config)
    return keep_chunks_and_prefixes(vllm_config) if is_latent else nothing_to_put_right


def check_sizes(vllm_config: "VllmConfig") -> None:
    """Refuse what cannot hold one request of the longest length, and an indexer that does not fit the model.

    Does nothing for other backends.

    Args:
        vllm_config: vLLM's configuration, with the block size that the platform has chosen.

    Raises:
        ConfigError: slots or host memory are too few, or more than there are; the indexer cannot be read, is damaged,
            belongs to another model, or has chunks that do not fill a block.
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


def _tell_options(vllm_config: "VllmConfig") -> None:
    """Log which options of ours are in force: one on vLLM's command line replaces the whole section of a file."""
    given = read_config(vllm_config).model_dump(exclude_unset=True)
    told = ", ".join(f"{name} {value!r}" for name, value in sorted(given.items()))
    logger.info_once("flashmemory: options given: %s; defaults for all others", told or "none")


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


def take_smallest_blocks(cache: "CacheConfig", model: "ModelConfig | None") -> None:
    """Give blocks the smallest size that the platform's attention takes, unless the user gave one.

    A selection keeps or leaves whole blocks. vLLM's default is the smallest on CUDA, which it checks itself; on a CPU
    it is four times that, and of so few large blocks no choice is good.

    Args:
        cache: vLLM's configuration of its cache; changed on a CPU.
        model: vLLM's configuration of the model.

    Raises:
        ConfigError: the size given is not one that a CPU's attention takes.
    """
    if not current_platform.is_cpu():
        return
    backend = cpu_backend(model)
    sizes = backend.get_supported_kernel_block_sizes()
    smallest = min(getattr(size, "base", size) for size in sizes)
    if not cache.user_specified_block_size:
        # Else vLLM puts its own default there
        cache.block_size, cache.user_specified_block_size = smallest, True
    elif not backend.supports_block_size(cache.block_size):
        latents = "with latent attention " if backend.is_mla() else ""
        allowed = f"is {smallest}" if smallest in sizes else f"are multiples of {smallest}"
        raise ConfigError(f"--block-size is {cache.block_size}: allowed on a CPU {latents}{allowed}")


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
