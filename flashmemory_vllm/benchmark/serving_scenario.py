"""Scenario files of the kind `serving`: which servers `vllm bench serve` loads, and with what."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flashmemory_vllm.benchmark.cells import llm_arguments
from flashmemory_vllm.benchmark.scenario import EngineOptions, Positive, Strict
from flashmemory_vllm.config import SECTION
from flashmemory_vllm.errors import ConfigError

ServedEngine = Literal["stock", "fp8", "offload", "flashmemory"]
KIND = "serving"
# All that is ours in vLLM's own servers; a name, since nothing of vLLM is imported here
KV_BYTES_CLASS = "flashmemory_vllm.plugin.kv_bytes.KvBytes"
KV_BYTES_METHOD = "flashmemory_kv_bytes"
# Of a warm-up where the prompts come from a dataset of vLLM's
_WARM_UP_TOKENS = 512

_Milliseconds = Annotated[float, Field(gt=0)]


class ServingLoad(Strict):
    """Requests that `vllm bench serve` sends: random ones of a length, ones of lengths from a file, or its datasets'.

    Attributes:
        name: tells it apart from the others of its scenario.
        requests: how many.
        prompt_tokens: tokens of a prompt, those of `shared_prefix_tokens` included.
        output_tokens: tokens of an answer; ends of texts are ignored.
        shared_prefix_tokens: the first tokens of all prompts, the same for all.
        spread: prompts, behind the shared prefix, and answers are up to this share longer or shorter.
        lengths: instead of these, a file of JSON lines with `input_length` and `output_length`, one for each request.
            Their tokens are random.
        max_concurrency: requests that are under way at once. Default: no limit.
        request_rate: requests a second, at random times. Default: all at once, or as others end.
        client: further options of `vllm bench serve` by its names, such as `{dataset-name: custom}`.
        warm_ups: requests before those that count, all at once, of other tokens.
        time_limit_s: seconds after which the load is given up.
        target: what one hopes to see, in words.
    """

    name: str
    requests: Positive
    prompt_tokens: Positive | None = None
    output_tokens: Positive | None = None
    shared_prefix_tokens: int = Field(default=0, ge=0)
    spread: float = Field(default=0.0, ge=0, lt=1)
    lengths: str | None = None
    max_concurrency: Positive | None = None
    request_rate: float | None = Field(default=None, gt=0)
    client: dict[str, Any] = Field(default_factory=dict)
    warm_ups: int = Field(default=2, ge=0)
    time_limit_s: float = Field(default=1800, gt=0)
    target: str | None = None

    @model_validator(mode="after")
    def _has_one_source(self) -> "ServingLoad":
        sizes = [self.prompt_tokens is not None, self.output_tokens is not None]
        sources = [any(sizes), self.lengths is not None, "dataset-name" in self.client]
        if sum(sources) != 1 or any(sizes) != all(sizes):
            raise ValueError("allowed is one of: prompt_tokens with output_tokens, lengths, and client.dataset-name")
        if (self.shared_prefix_tokens or self.spread) and self.prompt_tokens is None:
            raise ValueError("shared_prefix_tokens and spread go with prompt_tokens")
        if self.prompt_tokens is not None and self.shared_prefix_tokens >= self.prompt_tokens:
            raise ValueError("shared_prefix_tokens is allowed below prompt_tokens")
        return self

    def read_lengths(self) -> list[tuple[int, int]]:
        """Tokens of each prompt and answer of the file `lengths`, as many as there are requests.

        Raises:
            ConfigError: it cannot be read, holds something else, or has fewer lines.
        """
        assert self.lengths is not None
        try:
            lines = Path(self.lengths).read_text(encoding="utf-8").splitlines()[: self.requests]
            pairs = [(int(row["input_length"]), int(row["output_length"])) for row in map(json.loads, lines)]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"lengths is {self.lengths} ({type(error).__name__}: {error}): allowed are lines such as "
                '{"input_length": 900, "output_length": 120}'
            ) from None
        if len(pairs) < self.requests or any(min(pair) < 1 for pair in pairs):
            raise ConfigError(f"lengths is {self.lengths}: allowed are {self.requests} lines or more of lengths from 1")
        return pairs

    def warm_up_tokens(self) -> int:
        """Tokens of a prompt that warms up: as long as the longest."""
        if self.prompt_tokens is not None:
            return self.prompt_tokens
        return max(tokens for tokens, _ in self.read_lengths()) if self.lengths is not None else _WARM_UP_TOKENS


class ServingScenario(Strict):
    """One file.

    Attributes:
        kind: says that it is one of these.
        name: of the scenario, for rows and titles.
        why: the question that it answers, in a sentence.
        itl_limit_ms: an answer counts for goodput if the mean time between its tokens is at most this.
        ttft_limit_ms: and if its first token came within this. Default: no limit.
        engine: options of vLLM, for all engines; `kv_cache_memory_gib` is the device memory that each gets for KV.
        engines: servers to measure, one after the other. Default: all there are.
        changes: what is different for an engine, by its name.
        flashmemory: options of our section of `additional_config`.
        loads: what they are sent, one after the other.
    """

    kind: Literal["serving"]
    name: str
    why: str
    itl_limit_ms: _Milliseconds
    ttft_limit_ms: _Milliseconds | None = None
    engine: EngineOptions
    engines: list[ServedEngine] = Field(default=["stock", "fp8", "offload", "flashmemory"], min_length=1)
    changes: dict[ServedEngine, EngineOptions] = Field(default_factory=dict)
    flashmemory: dict[str, Any] = Field(default_factory=dict)
    loads: list[ServingLoad] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_fair(self) -> "ServingScenario":
        if self.engine.kv_cache_memory_gib is None:
            raise ValueError("engine.kv_cache_memory_gib is missing: all engines get the same")
        if unequal := [name for name, options in self.changes.items() if options.kv_cache_memory_gib is not None]:
            raise ValueError(f"changes of {', '.join(unequal)}: kv_cache_memory_gib is the same for all engines")
        names = [load.name for load in self.loads]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"loads named {', '.join(twice)} twice: allowed are different names")
        return self


@dataclass(frozen=True, slots=True)
class ServingCell:
    """One load on one server.

    Attributes:
        scenario: the file it is from.
        engine: name of the engine.
        model: folder or id of the model.
        options: of `vllm serve`, as its `--config` takes them.
        load: what the server is sent.
    """

    scenario: ServingScenario
    engine: ServedEngine
    model: str
    options: Mapping[str, Any]
    load: ServingLoad

    @property
    def key(self) -> tuple[str, str, str]:
        """Tells the cells of several scenarios apart."""
        return self.scenario.name, self.load.name, self.engine

    @property
    def server_key(self) -> str:
        """The same for cells that one server can measure."""
        return json.dumps([self.engine, self.model, dict(self.options)], sort_keys=True)

    @property
    def seed(self) -> int:
        """Of the prompts: engines get the same ones, loads different ones."""
        return zlib.crc32(f"{self.scenario.name}/{self.load.name}".encode()) >> 1


def make_serving_cells(
    scenario: ServingScenario, engines: list[ServedEngine] | None, model: Mapping[str, Any]
) -> list[ServingCell]:
    """Every cell of a scenario.

    Args:
        scenario: the file.
        engines: servers to measure. Default: the scenario's.
        model: arguments of `vllm.LLM` that say what model to serve.

    Raises:
        ConfigError: a file of lengths is not what it should be.
    """
    for load in scenario.loads:
        load.warm_up_tokens()
    return [
        ServingCell(scenario, engine, str(model["model"]), _serve_options(scenario, engine, model), load)
        for engine in dict.fromkeys(engines or scenario.engines)
        for load in scenario.loads
    ]


def _serve_options(scenario: ServingScenario, engine: ServedEngine, model: Mapping[str, Any]) -> dict[str, Any]:
    options = scenario.engine.updated(scenario.changes.get(engine, EngineOptions()))
    arguments = {**model, "worker_extension_cls": KV_BYTES_CLASS}
    if engine == "fp8":
        arguments["kv_cache_dtype"] = "fp8"
    if engine == "flashmemory":
        arguments |= {"attention_backend": SECTION, "additional_config": {SECTION: dict(scenario.flashmemory)}}
    arguments |= llm_arguments(options, engine == "offload")
    return {name.replace("_", "-"): value for name, value in arguments.items() if name != "model"}
