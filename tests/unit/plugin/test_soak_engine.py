"""How much less likely a token is than the likeliest, from vLLM's log-probabilities."""

from types import SimpleNamespace

import pytest

from flashmemory_vllm.plugin.soak_engine import UNLIKELY, _deficit

TOLD = {7: SimpleNamespace(logprob=-0.5), 8: SimpleNamespace(logprob=-0.75), 9: SimpleNamespace(logprob=-4.0)}


@pytest.mark.parametrize(("token", "deficit"), [(7, 0.0), (8, 0.25), (9, 3.5), (10, UNLIKELY)])
def test_a_token_is_weighed_against_the_likeliest(token: int, deficit: float) -> None:
    assert _deficit(TOLD, token) == deficit
