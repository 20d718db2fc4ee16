"""The request ids that clients know, from those of vLLM's engine."""

import re
from collections.abc import Sequence

from vllm import envs

from flashmemory_vllm.runtime.status import RequestStatus

# One of several answers to a prompt; what vLLM appends so that ids are unique.
_ANSWER = re.compile(r"^\d+_")
_UNIQUE = re.compile(r"-[0-9a-f]{8}$")


def client_request_id(engine_request_id: str) -> str:
    """The id that vLLM's API server gave a request, before its engine made it unique."""
    without_answer = _ANSWER.sub("", engine_request_id)
    return without_answer if envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION else _UNIQUE.sub("", without_answer)


def find_request(requests: Sequence[RequestStatus], request_id: str) -> RequestStatus | None:
    """The request that an id names; of several prompts or answers with one id the longest known.

    Args:
        requests: the known ones.
        request_id: the engine's id, the API server's, or that of a completion, which lacks the number of the prompt.
    """
    for names in (
        lambda request: request.engine_request_id,
        lambda request: request.request_id,
        lambda request: re.sub(r"-\d+$", "", request.request_id),
    ):
        for request in requests:
            if names(request) == request_id:
                return request
    return None
