"""`GET /flashmemory/stats`: the counters of every engine as JSON. Loaded if `VLLM_PLUGINS` names us."""

from argparse import Namespace
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import State

from flashmemory_vllm.observability.counters import CounterReader
from flashmemory_vllm.plugin.checks import is_selected
from flashmemory_vllm.plugin.counter_files import engine_counters_directory

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.tasks import SupportedTask

router = APIRouter(tags=["flashmemory"])


class EngineStats(BaseModel):
    """What one engine has counted."""

    model_config = ConfigDict(frozen=True)

    engine: int = Field(description="Index of the engine, as in the `engine` label of /metrics.")
    values: dict[str, float] = Field(
        description="Value by metric name without its prefix. Empty if the engine runs on another machine."
    )


class Stats(BaseModel):
    """Answer of `GET /flashmemory/stats`."""

    model_config = ConfigDict(frozen=True)

    engines: list[EngineStats]


@router.get("/flashmemory/stats")
def read_stats(request: Request) -> Stats:
    """Read the counters of every engine of this server now."""
    readers: list[CounterReader] = request.app.state.flashmemory_readers
    if not readers:
        raise HTTPException(HTTPStatus.NOT_FOUND, "this server does not run --attention-backend flashmemory")
    return Stats(engines=[EngineStats(engine=index, values=reader.read()) for index, reader in enumerate(readers)])


class FlashMemoryEndpoints:
    """vLLM's endpoint plugin: the routes, and the state they read."""

    name = "flashmemory"
    required_tasks: "tuple[SupportedTask, ...] | None" = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes."""
        app.state.flashmemory_readers = []
        app.include_router(router)

    async def init_state(
        self,
        engine_client: "EngineClient | None",
        state: State,
        args: Namespace,  # noqa: ARG002 - vLLM's signature
    ) -> None:
        """Find the counters of this server's engines; leaves none when they run another backend."""
        if engine_client is None or not is_selected(engine_client.vllm_config):
            return
        config = engine_client.vllm_config
        num_engines = config.parallel_config.data_parallel_size
        state.flashmemory_readers = [
            CounterReader(engine_counters_directory(config, index)) for index in range(num_engines)
        ]
