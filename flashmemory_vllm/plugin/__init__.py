"""The vLLM border: the only package that imports vllm."""
