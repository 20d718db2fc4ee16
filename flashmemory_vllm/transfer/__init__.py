"""Executes the copies of a step plan: host pool, device pages, copy engine, staging. It moves bytes."""
