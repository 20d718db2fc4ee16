"""Our HTTP routes: counters, the live state of memory and requests, and a page that shows it.

Loaded if `VLLM_PLUGINS` names us. Every route that tells anything asks for the server's API key, if it has one; the
page is the same for everybody and asks these routes.
"""

from argparse import Namespace
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import State
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from flashmemory_vllm.observability.counters import CounterReader
from flashmemory_vllm.plugin.api_key import api_keys, require_api_key
from flashmemory_vllm.plugin.checks import is_selected
from flashmemory_vllm.plugin.counter_files import engine_counters_directory
from flashmemory_vllm.plugin.request_ids import find_request
from flashmemory_vllm.plugin.status_page import page_router
from flashmemory_vllm.plugin.status_reader import MAX_STRIPS, Status, StatusReader
from flashmemory_vllm.runtime.status import RequestStatus, StripsAsked

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.tasks import SupportedTask


def _problem(description: str) -> dict[str, Any]:
    return {"model": ErrorResponse, "description": description}


_NO_ANSWER: dict[int | str, dict[str, Any]] = {503: _problem("The engine does not answer.")}
_WITH_STRIPS = _NO_ANSWER | {400: _problem("`strips` is not within its bounds.")}

router = APIRouter(
    prefix="/flashmemory",
    tags=["flashmemory"],
    dependencies=[Depends(require_api_key)],
    responses={
        401: _problem("The server has an API key, and it was not given."),
        404: _problem("Another attention backend runs, or there is no such request."),
    },
)


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


class Requests(BaseModel):
    """Answer of `GET /flashmemory/requests`."""

    model_config = ConfigDict(frozen=True)

    step: int = Field(description="The last step that was planned.")
    requests: list[RequestStatus] = Field(description="Known requests, the longest known first.")


class OneRequest(RequestStatus):
    """Answer of `GET /flashmemory/requests/{request_id}`."""

    step: int = Field(description="The last step that was planned.")


def _reader(request: Request) -> StatusReader:
    """Asks the engine; 404 if it is not ours."""
    reader: StatusReader | None = request.app.state.flashmemory_status
    if reader is None:
        raise _not_ours()
    return reader


Reader = Annotated[StatusReader, Depends(_reader)]


async def _read_status(
    reader: Reader,
    strips: Annotated[
        int,
        Query(ge=0, le=MAX_STRIPS, description="How many requests come with their strips, the longest known first."),
    ] = 0,
) -> Status:
    """The engine's status."""
    return await reader.read(StripsAsked(strips))


CurrentStatus = Annotated[Status, Depends(_read_status)]


@router.get("/stats")
def read_stats(request: Request) -> Stats:
    """Read the counters of every engine of this server now."""
    readers: list[CounterReader] = request.app.state.flashmemory_readers
    if not readers:
        raise _not_ours()
    return Stats(engines=[EngineStats(engine=index, values=reader.read()) for index, reader in enumerate(readers)])


@router.get("/status", responses=_WITH_STRIPS)
def read_status(status: CurrentStatus) -> Status:
    """What is where after the current step: memory, every request, the blocks of some, the last selections."""
    return status


@router.get("/requests", responses=_WITH_STRIPS)
def read_requests(status: CurrentStatus) -> Requests:
    """Every known request, and where the blocks of some are."""
    return Requests(step=status.step, requests=status.requests)


@router.get("/requests/{request_id:path}", responses=_NO_ANSWER)
async def read_request(
    request_id: Annotated[
        str,
        Path(description="`request_id` or `engine_request_id` of a request, or the id of a completion."),
    ],
    reader: Reader,
) -> OneRequest:
    """One request and where its blocks are; of several prompts or answers with this id the longest known."""
    # As the page asks: one answer for both
    status = await reader.read(StripsAsked(MAX_STRIPS))
    found = find_request(status.requests, request_id)
    if found is not None and found.strips is None:
        status = await reader.read(StripsAsked(0, found.engine_request_id))
        found = find_request(status.requests, request_id)
    if found is None:
        raise HTTPException(
            HTTPStatus.NOT_FOUND, f"no request {request_id!r} runs: it has ended, has not started, or never was"
        )
    return OneRequest(step=status.step, **dict(found))


class FlashMemoryEndpoints:
    """vLLM's endpoint plugin: the routes, and the state they read."""

    name = "flashmemory"
    required_tasks: "tuple[SupportedTask, ...] | None" = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes."""
        app.state.flashmemory_readers = []
        app.state.flashmemory_status = None
        app.state.flashmemory_api_keys = ()
        app.include_router(router)
        app.include_router(page_router)

    async def init_state(self, engine_client: "EngineClient | None", state: State, args: Namespace) -> None:
        """Find this server's engines and keys; leaves no engine when they run another backend."""
        state.flashmemory_api_keys = api_keys(args)
        if engine_client is None or not is_selected(engine_client.vllm_config):
            return
        config = engine_client.vllm_config
        num_engines = config.parallel_config.data_parallel_size
        state.flashmemory_readers = [
            CounterReader(engine_counters_directory(config, index)) for index in range(num_engines)
        ]
        state.flashmemory_status = StatusReader(engine_client, counters=state.flashmemory_readers)


def _not_ours() -> HTTPException:
    return HTTPException(HTTPStatus.NOT_FOUND, "this server does not run --attention-backend flashmemory")
