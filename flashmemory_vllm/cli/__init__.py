"""The `flashmemory` command."""
