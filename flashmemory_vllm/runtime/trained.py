"""Options that a trained indexer has a say in: as asked for, as trained, or the default."""

from flashmemory_vllm.config import SECTION, FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.indexer.checkpoint import read_spec, resolve_indexer
from flashmemory_vllm.indexer.forecast_model import HYSTERESIS
from flashmemory_vllm.indexer.neural_model import IndexerSpec
from flashmemory_vllm.runtime.shape import AttentionShape


def anchor_layers(config: FlashMemoryConfig, shape: AttentionShape) -> tuple[int, ...]:
    """The layers whose queries and keys feed the selector: those asked for, a trained indexer's own, or the default.

    Raises:
        ConfigError: a layer does not exist, a group has none, or the indexer cannot be read or is for another depth.
    """
    given = config.anchor_layers
    spec = _trained(config)
    if spec is not None:
        if spec.num_layers != shape.num_layers:
            raise ConfigError(
                f"{SECTION}.indexer: {config.indexer!r} was trained for a model of {spec.num_layers} attention layers, "
                f"this one has {shape.num_layers}"
            )
        given = tuple(shape.model_layers[place] for place in spec.anchor_layers) if given is None else given
    return shape.anchor_layers(given, shape.layer_groups(config.layer_groups))


def tau_steps(config: FlashMemoryConfig) -> int:
    """Decode steps between two selections: those asked for, a trained indexer's own, or what suits the selector.

    Raises:
        ConfigError: the indexer cannot be read.
    """
    trained = _trained(config)
    return config.tau(None if trained is None else trained.tau)


def query_window(config: FlashMemoryConfig) -> int:
    """Prompt tokens of a first selection: those asked for, a trained indexer's own, or the last one.

    Raises:
        ConfigError: the indexer cannot be read.
    """
    trained = _trained(config)
    return config.query_window or (1 if trained is None else trained.query_window)


def num_kept(config: FlashMemoryConfig) -> int:
    """Newest queries of each request that the device keeps: those that a selection reads, and the running step's.

    A question is kept by itself.

    Raises:
        ConfigError: the indexer cannot be read.
    """
    return 1 + (tau_steps(config) if config.own.memory_decay or forecasts(config) else 1)


def forecasts(config: FlashMemoryConfig) -> bool:
    """Whether a trained indexer remembers what every token paid.

    Raises:
        ConfigError: the indexer cannot be read.
    """
    trained = _trained(config)
    return trained is not None and bool(trained.memory_decays)


def hysteresis(config: FlashMemoryConfig) -> float:
    """How much more a block is worth that is held: as asked for, or what suits a forecast or the selector.

    Raises:
        ConfigError: the indexer cannot be read.
    """
    return HYSTERESIS if config.hysteresis is None and forecasts(config) else config.own.hysteresis


def opening_steps(config: FlashMemoryConfig) -> int:
    """Decode steps that each end with a selection of their own: those asked for, a trained indexer's own, or none.

    Raises:
        ConfigError: the indexer cannot be read.
    """
    if config.opening_steps is not None:
        return config.opening_steps
    trained = _trained(config)
    return 0 if trained is None else trained.opening_steps


def _trained(config: FlashMemoryConfig) -> IndexerSpec | None:
    """What the indexer was trained with, if there is one."""
    return None if config.indexer is None else read_spec(resolve_indexer(config.indexer, config.indexer_revision))
