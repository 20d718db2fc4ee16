"""Other options for a server that runs, as far as its scheduler allows."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.plugin.checks import read_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def reconfigured(vllm_config: "VllmConfig", options: Mapping[str, object]) -> FlashMemoryConfig:
    """Those that the server started with, and others instead of some.

    Args:
        vllm_config: as the server was started.
        options: replace the options given at start.

    Raises:
        ConfigError: an option is wrong, or would let a request use more slots than the scheduler reserves.
    """
    started_with = read_config(vllm_config)
    config = FlashMemoryConfig.from_additional_config(
        {"flashmemory": started_with.model_dump(exclude_unset=True) | dict(options)}
    )
    fixed = (
        "mode",
        "min_sparse_tokens",
        "sink_tokens",
        "recent_tokens",
        "growth_reserve_tokens",
    )
    changed = [name for name in fixed if getattr(config, name) != getattr(started_with, name)]
    # A smaller share than the scheduler reserves is fine.
    changed += ["resident_ratio"] * (config.resident_ratio > started_with.resident_ratio)
    if changed:
        raise ConfigError(
            f"flashmemory.{changed[0]}: {getattr(config, changed[0])} given, but the scheduler's budgets are fixed "
            f"at start, with {getattr(started_with, changed[0])}"
        )
    return config
