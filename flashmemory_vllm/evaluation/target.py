"""A running server as `flashmemory eval` asks it: greedy completions of token ids, and what its decode steps read."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from flashmemory_vllm.errors import ConfigError, FlashMemoryError
from flashmemory_vllm.evaluation.eval_rows import Side
from flashmemory_vllm.evaluation.standard import api_url, open_client, read_max_model_len

if TYPE_CHECKING:
    from openai import OpenAI

REQUEST_SECONDS = 3600
RESIDENT = "flashmemory:decode_resident_blocks_total"
CONTEXT = "flashmemory:decode_context_blocks_total"
FETCHED = "flashmemory:recalled_blocks_total"
# What forces a server along given tokens: its class for vLLM's --logits-processors, and a request's argument of it
FORCED_TOKENS = "flashmemory_vllm.plugin.forced_tokens:ForcedTokens"
FORCED_ARGUMENT = "forced_token_ids"
# The server's processes put their counters on /metrics a little later.
SETTLE_SECONDS = 0.5
_ID = "token_id:"


@dataclass(frozen=True, slots=True)
class Completion:
    """What a server wrote after a prompt.

    Attributes:
        text: without special tokens.
        token_ids: `[T]` generated ids; empty unless log-probabilities were asked for.
        logprobs: `[T]` natural log-probability by token id, of the likeliest tokens at each position.
    """

    text: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[Mapping[int, float]] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """One server.

    Attributes:
        side: whether it is the dense or the sparse one.
        url: where it listens.
        model: name of the model at the server.
        client: of its OpenAI API.
        max_model_len: most tokens of prompt and answer.
        version: version of vLLM, if it tells.
    """

    side: Side
    url: str
    model: str
    client: "OpenAI"
    max_model_len: int
    version: str | None

    @classmethod
    def connect(cls, side: Side, url: str, model: str) -> "Target":
        """Look at a running server. Its API key is read from `OPENAI_API_KEY`.

        Args:
            side: which one it is.
            url: with or without `/v1`.
            model: name of the model at the server.

        Raises:
            ConfigError: the server does not answer, does not serve the model or, as the sparse one, does not run this
                backend, or `openai` is not installed.
        """
        root = api_url(url).removesuffix("/v1")
        client = open_client(root, REQUEST_SECONDS)
        target = cls(side, root, model, client, read_max_model_len(client, model), _read_version(root))
        metrics = target._read_metrics()
        if side == "sparse" and metrics and not metrics.get(CONTEXT):
            raise ConfigError(
                f"--base-url is {root}: its /metrics has no {CONTEXT}, allowed is a server with this backend"
            )
        return target

    def check_room(self, tokens: int, option: str) -> None:
        """See that a prompt and its answer fit.

        Raises:
            ConfigError: they do not; the message names the option that asks for them.
        """
        if tokens > self.max_model_len:
            raise ConfigError(
                f"{option}: prompt and answer take {tokens:,} tokens, allowed is what the {self.side} server at "
                f"{self.url} takes, max_model_len {self.max_model_len:,}"
            )

    def complete(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        logprobs: int | None = None,
        forced: Sequence[int] | None = None,
    ) -> Completion:
        """Go on greedily after a prompt.

        Args:
            prompt_ids: token ids.
            max_tokens: tokens to generate at most.
            logprobs: how many of the likeliest tokens to tell at each position, beside the one that was written.
                Default: none, and no ids.
            forced: tokens to write instead of the likeliest; the server must run `FORCED_TOKENS`. Default: none.

        Raises:
            FlashMemoryError: the server failed.
        """
        from openai import OpenAIError

        extra: dict[str, object] = {"return_tokens_as_token_ids": True} if logprobs else {}
        if forced is not None:
            extra |= {"ignore_eos": True, "vllm_xargs": {FORCED_ARGUMENT: list(forced)}}
        try:
            answer = self.client.completions.create(
                model=self.model,
                prompt=list(prompt_ids),
                max_tokens=max_tokens,
                temperature=0,
                logprobs=logprobs,
                extra_body=extra or None,
            )
        except OpenAIError as error:
            raise FlashMemoryError(f"the {self.side} server at {self.url} failed: {error}") from error
        choice = answer.choices[0]
        told = choice.logprobs
        if not logprobs or told is None or told.tokens is None or told.top_logprobs is None:
            return Completion(choice.text)
        ids = [int(token.removeprefix(_ID)) for token in told.tokens]
        tops = [{int(token.removeprefix(_ID)): value for token, value in top.items()} for top in told.top_logprobs]
        return Completion(choice.text, ids, tops)

    def read_blocks(self) -> tuple[float, float] | None:
        """Blocks that decode steps attended to so far, and blocks they would have dense; None if it does not tell."""
        time.sleep(SETTLE_SECONDS)
        metrics = self._read_metrics()
        resident, context = (metrics.get(name) for name in (RESIDENT, CONTEXT))
        return None if resident is None or context is None else (sum(resident), sum(context))

    def read_fetched(self) -> float | None:
        """Blocks that came from host memory so far; None if it does not tell."""
        time.sleep(SETTLE_SECONDS)
        found = self._read_metrics().get(FETCHED)
        return sum(found) if found else None

    def _read_metrics(self) -> dict[str, list[float]]:
        """Samples by name; empty if the server has no such page."""
        import httpx

        try:
            response = httpx.get(f"{self.url}/metrics", timeout=REQUEST_SECONDS)
            families = list(text_string_to_metric_families(response.raise_for_status().text))
        except (httpx.HTTPError, ValueError):
            return {}
        values: dict[str, list[float]] = {}
        for sample in (sample for family in families for sample in family.samples):
            values.setdefault(sample.name, []).append(sample.value)
        return values


def _read_version(root: str) -> str | None:
    import httpx

    try:
        found = httpx.get(f"{root}/version", timeout=REQUEST_SECONDS).json()
    except (httpx.HTTPError, ValueError):
        return None
    version = found.get("version") if isinstance(found, dict) else None
    return None if version is None else str(version)
