"""Scenario files: what to measure, with which engine options, and why."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flashmemory_vllm.errors import ConfigError

EngineName = Literal["stock", "ideal", "offload", "flashmemory"]
Metric = Literal[
    "step_ms", "decode_tokens_per_s", "prefill_tokens_per_s", "output_tokens_per_s", "stall_share", "decoding"
]
# What share of a prompt's tokens the ideal engine gets, in thousandths: the default resident ratio
IDEAL_PER_MILLE = 135

AnyScenario = TypeVar("AnyScenario", bound=BaseModel)
Positive = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """Takes no field that it does not know, and no value of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class EngineOptions(Strict):
    """Options of vLLM; one that is not given keeps vLLM's default.

    Attributes:
        max_model_len: tokens of the longest request, or `largest` for the most that the KV memory allows.
        kv_cache_memory_gib: GiB of device memory for KV. Default: what vLLM finds free.
        max_num_seqs: requests that run at once.
        max_num_batched_tokens: tokens of one step.
        enforce_eager: no compilation and no CUDA graphs.
        block_size: tokens of a KV block.
        dtype: of weights, activations and KV.
        cudagraph_capture_sizes: batch sizes with a CUDA graph; few of them shorten the start.
        kv_offloading_gib: GiB of host memory for vLLM's own offloading; only `offload` uses it.
        llm: further arguments of `vllm.LLM`, by its names.
    """

    max_model_len: Positive | Literal["largest"] | None = None
    kv_cache_memory_gib: float | None = Field(default=None, gt=0)
    max_num_seqs: Positive | None = None
    max_num_batched_tokens: Positive | None = None
    enforce_eager: bool | None = None
    block_size: Positive | None = None
    dtype: str | None = None
    cudagraph_capture_sizes: list[Positive] | None = None
    kv_offloading_gib: float | None = Field(default=None, gt=0)
    llm: dict[str, Any] = Field(default_factory=dict)

    def updated(self, other: "EngineOptions") -> "EngineOptions":
        """These options, except where `other` gives its own."""
        given = {name: getattr(other, name) for name in other.model_fields_set}
        return self.model_copy(update=given | {"llm": self.llm | other.llm})


class EngineChange(Strict):
    """What is different for one engine.

    Attributes:
        engine: options of vLLM that replace the common ones.
        prompt_tokens: tokens of each prompt, instead of the measurement's.
    """

    engine: EngineOptions = EngineOptions()
    prompt_tokens: Positive | None = None


class PromptGroup(Strict):
    """Some prompts of one length.

    Attributes:
        count: how many.
        prompt_tokens: tokens of each.
    """

    count: Positive
    prompt_tokens: Positive


class Load(Strict):
    """How requests are made and what is read off them; what measurements and sweeps have in common.

    Attributes:
        output_tokens: tokens that every request generates while all of them do, the last one's first included.
        engines: engines to measure. Default: those of the command line.
        ideal: also measure stock with 13.5 % of the prompt tokens, which is what attention should cost us.
        shared_prefix: the first 90 % of a prompt are the same in all requests and computed before the clock
            starts. Decode only: prefill is not reported.
        keep_prefixes: prompts begin as those of earlier measurements do, and their blocks may still be cached.
            Decode only, as above.
        compare_outputs: keep digests of the generated ids, to compare the engines'.
        keep_steps: write the time of every decode step to the row.
        warm_ups: times that the measurement runs on other prompts before it counts.
        must_fit: skip the measurement where the engine's KV blocks cannot hold all requests at once.
        metric: what `value` of a row is.
        target: what one hopes to see, in words.
        engine: options of vLLM, for all engines.
        stock: what is different for stock vLLM; `ideal` and `offload` follow it unless they have their own.
        offload: what is different for vLLM's own offloading.
        flashmemory: options of our section of `additional_config`.
    """

    output_tokens: Positive
    engines: list[EngineName] | None = None
    ideal: bool = False
    shared_prefix: bool = False
    keep_prefixes: bool = False
    compare_outputs: bool = False
    keep_steps: bool = False
    warm_ups: int = Field(default=0, ge=0)
    must_fit: bool = False
    metric: Metric = "step_ms"
    target: str | None = None
    engine: EngineOptions = EngineOptions()
    stock: EngineChange = EngineChange()
    offload: EngineChange | None = None
    flashmemory: dict[str, Any] = Field(default_factory=dict)


class Measurement(Load):
    """One load on one engine after the other.

    Attributes:
        name: tells it apart from the others of its scenario.
        batch: requests at once.
        prompt_tokens: tokens of each prompt; goes with `batch`.
        mix: prompts of several lengths, instead of the two.
    """

    name: str
    batch: Positive | None = None
    prompt_tokens: Positive | None = None
    mix: list[PromptGroup] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _has_one_load(self) -> "Measurement":
        given = [self.batch is not None, self.prompt_tokens is not None]
        if any(given) if self.mix is not None else not all(given):
            raise ValueError("allowed is either batch with prompt_tokens, or mix")
        return self

    def prompt_lens(self) -> list[int]:
        """Tokens of each prompt."""
        if self.mix is not None:
            return [group.prompt_tokens for group in self.mix for _ in range(group.count)]
        assert self.batch is not None
        assert self.prompt_tokens is not None
        return [self.prompt_tokens] * self.batch


class Sweep(Load):
    """Every pair of a prompt length and a batch, lengths and batches in ascending order.

    Attributes:
        prompt_tokens: prompt lengths.
        batch: batches.
        max_total_tokens: leaves out pairs with more prompt tokens than this in all.
    """

    prompt_tokens: list[Positive] = Field(min_length=1)
    batch: list[Positive] = Field(min_length=1)
    max_total_tokens: Positive

    def measurements(self) -> list[Measurement]:
        """One measurement for each pair; a pair that does not fit in an engine is skipped there."""
        own = {"prompt_tokens", "batch", "max_total_tokens"}
        common = {name: getattr(self, name) for name in self.model_fields_set - own} | {"must_fit": True}
        return [
            Measurement(name=f"{batch}x{tokens}", batch=batch, prompt_tokens=tokens, **common)
            for tokens in sorted(self.prompt_tokens)
            for batch in sorted(self.batch)
            if tokens * batch <= self.max_total_tokens
        ]


class Scenario(Strict):
    """One file.

    Attributes:
        name: of the scenario, for rows and titles.
        why: the question that it answers, in a sentence.
        engine: options of vLLM, for all engines and measurements.
        flashmemory: options of our section of `additional_config`, for all measurements.
        measurements: what to measure.
        sweep: measurements over a grid, after those.
    """

    name: str
    why: str
    engine: EngineOptions = EngineOptions()
    flashmemory: dict[str, Any] = Field(default_factory=dict)
    measurements: list[Measurement] = Field(default_factory=list)
    sweep: Sweep | None = None

    @model_validator(mode="after")
    def _measures_something_once(self) -> "Scenario":
        names = [measurement.name for measurement in self.all_measurements()]
        if not names:
            raise ValueError("allowed is one measurement or more, or a sweep")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"measurements named {', '.join(twice)} twice: allowed are different names")
        return self

    def all_measurements(self) -> list[Measurement]:
        """Those named and those of the sweep."""
        return [*self.measurements, *(self.sweep.measurements() if self.sweep else [])]


def load_scenario(path: Path, settings: Sequence[str] = ()) -> Scenario:
    """Read a scenario file.

    Args:
        path: YAML file.
        settings: `key=value` each, which replace what the file says. The key is a path with dots, such as
            `engine.max_num_seqs` or `measurements.0.batch`; the value is YAML.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown, missing or not allowed; all are listed.
    """
    return check_fields(Scenario, path, read_fields(path, settings))


def read_fields(path: Path, settings: Sequence[str] = ()) -> dict[str, Any]:
    """What a scenario file says, unchecked.

    Args:
        path: YAML file.
        settings: see `load_scenario`.

    Raises:
        ConfigError: the file cannot be read or is no mapping, or a setting has no place in it.
    """
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"scenario {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"scenario {path} holds {type(fields).__name__}: allowed is a mapping of fields")
    for setting in settings:
        if "=" not in setting:
            raise ConfigError(f"--set is {setting!r}: allowed is key=value, such as engine.max_num_seqs=8")
        _apply(fields, setting)
    return fields


def check_fields(kind: type[AnyScenario], path: Path, fields: dict[str, Any]) -> AnyScenario:
    """A scenario of a kind, made of what its file says.

    Raises:
        ConfigError: a field is unknown, missing or not allowed; all are listed.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, detail['loc'])) or 'file'}: {detail['msg']}"
            + ("" if isinstance(detail["input"], dict) else f" (given: {detail['input']!r})")
            for detail in error.errors()
        )
        raise ConfigError(f"scenario {path}: {reasons}") from None


def _apply(fields: dict[str, Any], setting: str) -> None:
    key, _, text = setting.partition("=")
    *parents, last = key.split(".")
    try:
        value = yaml.safe_load(text)
        holder: Any = fields
        for name in parents:
            holder = holder[int(name)] if isinstance(holder, list) else holder.setdefault(name, {})
        holder[int(last) if isinstance(holder, list) else last] = value
    except (AttributeError, IndexError, TypeError, ValueError, yaml.YAMLError):
        raise ConfigError(
            f"--set is {setting!r}: allowed is key=value, such as engine.max_num_seqs=8 or measurements.0.batch=4"
        ) from None
