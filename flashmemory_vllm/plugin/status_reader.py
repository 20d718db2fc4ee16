"""Asks a server's engine for its status."""

import asyncio
import time
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi import HTTPException
from pydantic import Field

from flashmemory_vllm.runtime.status import RuntimeStatus

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

ANSWER_SECONDS = 15.0
FRESH_SECONDS = 0.25


class Status(RuntimeStatus):
    """Answer of `GET /flashmemory/status`."""

    engine: int = Field(description="Index of the engine: the first one of this API server if there are several.")
    rank: int = Field(description="The worker that was asked; with tensor parallelism all of them do the same.")


class StatusReader:
    """Asks seldom, for steps wait for the answer: who asks while one is on its way or fresh shares it.

    Args:
        client: of the engine; its workers are ours.
        answer_seconds: how long to wait. Default: 15.
        fresh_seconds: how long an answer is as good as a new one. Default: a quarter.
    """

    def __init__(
        self,
        client: "EngineClient",
        answer_seconds: float = ANSWER_SECONDS,
        fresh_seconds: float = FRESH_SECONDS,
    ) -> None:
        self._client = client
        self._answer_seconds = answer_seconds
        self._fresh_seconds = fresh_seconds
        self._asked: asyncio.Task[Status] | None = None
        self._latest: Status | None = None
        self._fresh_until = 0.0

    async def read(self) -> Status:
        """The status after the step that runs now, or one just before it.

        Raises:
            HTTPException: 503, there was no answer in time.
        """
        if self._latest is not None and time.monotonic() < self._fresh_until:
            return self._latest
        if self._asked is None or self._asked.done():
            self._asked = asyncio.create_task(self._ask())
        try:
            # Shielded: it goes on when one of those who wait gives up.
            return await asyncio.wait_for(asyncio.shield(self._asked), self._answer_seconds)
        except TimeoutError:
            raise HTTPException(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"the engine did not answer within {self._answer_seconds:g} s: it runs a long step, or it hangs",
            ) from None

    async def _ask(self) -> Status:
        ranks = await self._client.collective_rpc("flashmemory_status")
        self._latest = Status.model_validate(ranks[0])
        self._fresh_until = time.monotonic() + self._fresh_seconds
        return self._latest
