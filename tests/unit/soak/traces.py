"""Small traces."""

from typing import Any

from flashmemory_vllm.soak.settings import SoakSettings, default_settings
from flashmemory_vllm.soak.trace import Trace, draw_trace


def settings(**changes: Any) -> SoakSettings:
    """Of a CPU, with few requests; `changes` replace others."""
    known: dict[str, Any] = {"num_requests": 60, "num_contexts": 6, "overcommit": 4.0, **changes}
    phase, runner = known.pop("phase", "dense"), known.pop("runner", "v1")
    return default_settings("cpu", phase, runner, is_async=known.pop("is_async", False), **known)


def trace(**changes: Any) -> Trace:
    """A trace of `settings`."""
    return draw_trace(settings(**changes))
