"""Executes the copies of a step plan: host pool, device pages, copy engine, streamed prefill attention."""
