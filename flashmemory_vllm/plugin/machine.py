"""How many engines of a server share this machine, and so its host memory."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# In `additional_config`, which goes to every process as it is
_TOLD = "flashmemory_engines_of_machine"


def tell_engines_of_machine(vllm_config: "VllmConfig") -> None:
    """Note how many engines run here, for processes that cannot know.

    VLLM makes each data-parallel engine of a dense model an independent one before its workers are started: for them
    there is one engine, of one.

    Args:
        vllm_config: in the process that starts the engines. Its `additional_config` is replaced, unless it tells
            already or there is one engine.
    """
    told, engines = vllm_config.additional_config, vllm_config.parallel_config.data_parallel_size_local
    if engines > 1 and isinstance(told, dict) and _TOLD not in told:
        vllm_config.additional_config = {**told, _TOLD: engines}


def engines_of_machine(vllm_config: "VllmConfig") -> int:
    """Engines of this server on this machine, asked in whichever of its processes."""
    told = vllm_config.additional_config
    engines = told.get(_TOLD) if isinstance(told, dict) else None
    return vllm_config.parallel_config.data_parallel_size_local if engines is None else int(engines)
