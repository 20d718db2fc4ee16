"""Virtual memory for vLLM's KV cache: `vllm serve MODEL --attention-backend flashmemory`."""

import logging

__version__ = "0.1.0"


def announce_backend() -> None:
    """Make the name of the backend known to vLLM's options.

    vLLM calls this through the `vllm.platform_plugins` entry point, the first that it loads in a process: as it looks
    for its platform, of which this is none. `LLM(attention_config={"backend": "flashmemory"})` is checked before
    general plugins are loaded.
    """
    from flashmemory_vllm.plugin.register import backend_member

    backend_member()


def register() -> None:
    """Make the `flashmemory` attention backend known to vLLM.

    vLLM calls this through the `vllm.general_plugins` entry point in every one of its processes: API server,
    engine core, workers and the subprocess that inspects the model. It may run more than once in a process. A vLLM
    in which the backend cannot even be registered goes on without it: who does not select it shall not notice it.
    """
    try:
        from flashmemory_vllm.plugin.register import register as register_backend

        register_backend()
    except (ImportError, AttributeError) as error:
        logging.getLogger("vllm.flashmemory").warning("flashmemory is not available, it needs vLLM 0.32: %s", error)
