"""Stand-ins for an engine that tells its status."""

import asyncio
from collections.abc import Sequence
from typing import Any

from tests.integration.plugin.engines import make_vllm_config

STRIP = [["sink", 2], ["evicted", 20], ["resident", 3], ["cached", 5], ["recalled", 1], ["evicted", 9], ["recent", 4]]


class StatusEngine:
    """Answers `collective_rpc` with statuses in turn, the last one again and again.

    Args:
        statuses: what to answer.
        num_ranks: how many workers answer.
        seconds: how long an answer takes.
    """

    def __init__(self, statuses: Sequence[dict[str, Any]], num_ranks: int = 1, seconds: float = 0) -> None:
        self.vllm_config = make_vllm_config()
        self.num_calls = 0
        self._statuses = statuses
        self._num_ranks = num_ranks
        self._seconds = seconds

    async def collective_rpc(self, method: str, args: tuple[int, str]) -> list[dict[str, Any] | None]:
        """As vLLM's `EngineClient`: one answer of each rank, of which only the first one tells something."""
        assert method == "flashmemory_status"
        longest_known, engine_request_id = args
        status = self._statuses[min(self.num_calls, len(self._statuses) - 1)]
        self.num_calls += 1
        await asyncio.sleep(self._seconds)
        requests = [
            request
            if index < longest_known or request["engine_request_id"] == engine_request_id
            else request | {"strips": None}
            for index, request in enumerate(status["requests"])
        ]
        return [status | {"requests": requests}, *[None] * (self._num_ranks - 1)]


def make_request(request_id: str, num_tokens: int = 1400, strips: Sequence[Any] = (STRIP,)) -> dict[str, Any]:
    """A request that decodes, as a worker tells it."""
    return {
        "request_id": request_id,
        "engine_request_id": f"{request_id}-0123abcd",
        "phase": "decode",
        "mode": "sparse",
        "reason": None,
        "num_tokens": num_tokens,
        "prefill_tokens": 1000,
        "num_blocks": sum(count for _, count in strips[0]),
        "resident_blocks": 10.0,
        "selection_step": 3,
        "strips": list(strips),
    }


def make_status(*requests: dict[str, Any], step: int = 5, rank: int = 0) -> dict[str, Any]:
    """A worker's status; each request has had one selection."""
    return {
        "engine": 0,
        "rank": rank,
        "step": step,
        "block_size": 32,
        "memory": {
            "slots_used": 120,
            "slots_pinned": 80,
            "slots_total": 143,
            "host_blocks_used": 500,
            "host_blocks_total": 1328,
        },
        "requests": list(requests),
        "selections": [
            {
                "step": 3,
                "request_id": request["request_id"],
                "engine_request_id": request["engine_request_id"],
                "first": False,
                "chosen_blocks": 10,
                "changed_blocks": 4,
                "recalled_blocks": 1,
                "late": True,
            }
            for request in requests
        ],
    }
