"""Asks a server's engine for its status."""

import asyncio
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi import HTTPException
from pydantic import Field

from flashmemory_vllm.observability.counters import CounterReader
from flashmemory_vllm.runtime.status import RuntimeStatus, StripsAsked

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

ANSWER_SECONDS = 15.0
FRESH_SECONDS = 0.25
# Steps wait while they are made
MAX_STRIPS = 16
WITHOUT_STRIPS = StripsAsked()


class Status(RuntimeStatus):
    """Answer of `GET /flashmemory/status`."""

    engine: int = Field(description="Index of the engine: the first one of this API server if there are several.")
    rank: int = Field(description="The worker that was asked, the first one.")
    native_blocks_used: int = Field(
        0, description="Blocks of windows and states that running requests hold on the device."
    )
    native_blocks_total: int = Field(
        0, description="Blocks on the device for windows and states, of layers beside full attention. 0 without any."
    )


class StatusReader:
    """Asks seldom, for steps wait for the answer: who asks while one is on its way or fresh shares it.

    Args:
        client: of the engine; its workers are ours.
        answer_seconds: how long to wait. Default: 15.
        fresh_seconds: how long an answer is as good as a new one. Default: a quarter.
        counters: of each engine, for what its scheduler knows and no worker does. Default: nothing of that is told.
    """

    def __init__(
        self,
        client: "EngineClient",
        answer_seconds: float = ANSWER_SECONDS,
        fresh_seconds: float = FRESH_SECONDS,
        counters: Sequence[CounterReader] = (),
    ) -> None:
        self._client = client
        self._answer_seconds = answer_seconds
        self._fresh_seconds = fresh_seconds
        self._counters = counters
        self._asked: dict[StripsAsked, asyncio.Task[Status]] = {}
        self._latest: dict[StripsAsked, tuple[float, Status]] = {}

    async def read(self, strips: StripsAsked = WITHOUT_STRIPS) -> Status:
        """The status after the step that runs now, or one just before it.

        Args:
            strips: the requests whose blocks are told one by one. Default: none.

        Raises:
            HTTPException: 503, there was no answer in time.
        """
        now = time.monotonic()
        self._latest = {key: told for key, told in self._latest.items() if told[0] > now}
        if strips in self._latest:
            return self._latest[strips][1]
        if strips not in self._asked:
            self._asked[strips] = asyncio.create_task(self._ask(strips))
        try:
            # Shielded: it goes on when one of those who wait gives up.
            return await asyncio.wait_for(asyncio.shield(self._asked[strips]), self._answer_seconds)
        except TimeoutError:
            raise HTTPException(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"the engine did not answer within {self._answer_seconds:g} s: it runs a long step, or it hangs",
            ) from None

    async def _ask(self, strips: StripsAsked) -> Status:
        try:
            ranks = await self._client.collective_rpc(
                "flashmemory_status", args=(strips.longest_known, strips.engine_request_id)
            )
            status = Status.model_validate(ranks[0] | self._native_blocks(ranks[0]["engine"]))
        finally:
            del self._asked[strips]
        self._latest[strips] = (time.monotonic() + self._fresh_seconds, status)
        return status

    def _native_blocks(self, engine: int) -> dict[str, int]:
        values = self._counters[engine].read() if self._counters else {}
        return {name: int(values.get(name, 0)) for name in ("native_blocks_used", "native_blocks_total")}
