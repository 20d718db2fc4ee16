"""Guards our routes with the server's API key: vLLM itself asks for it under `/v1` and a few other prefixes only."""

import secrets
from argparse import Namespace
from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from vllm import envs

_bearer = HTTPBearer(auto_error=False, description="The key of `--api-key` or `VLLM_API_KEY`. Without one: nothing.")


def api_keys(args: Namespace) -> tuple[str, ...]:
    """The keys that this server was started with; as in vLLM, the command line comes before the environment."""
    given: list[str] | None = getattr(args, "api_key", None)
    return tuple(key for key in (given or [envs.VLLM_API_KEY]) if key)


def require_api_key(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> None:
    """A dependency of routes: let nobody in without one of `app.state.flashmemory_api_keys`, if there are any.

    Raises:
        HTTPException: 401, no key was given or another one.
    """
    keys: tuple[str, ...] = request.app.state.flashmemory_api_keys
    if not keys:
        return
    given = credentials.credentials.encode() if credentials is not None else b""
    if not any(secrets.compare_digest(given, key.encode()) for key in keys):
        raise HTTPException(
            HTTPStatus.UNAUTHORIZED,
            "this server was started with an API key: send it as 'Authorization: Bearer KEY'",
            headers={"WWW-Authenticate": "Bearer"},
        )
