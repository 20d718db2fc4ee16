"""Virtual memory for vLLM's KV cache: `vllm serve MODEL --attention-backend flashmemory`."""

__version__ = "0.1.0"


def register() -> None:
    """Make the `flashmemory` attention backend known to vLLM.

    vLLM calls this through the `vllm.general_plugins` entry point in every one of its processes: API server,
    engine core, workers and the subprocess that inspects the model. It may run more than once in a process.
    """
    from flashmemory_vllm.plugin.register import register as register_backend

    register_backend()
