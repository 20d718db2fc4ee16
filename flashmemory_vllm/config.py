"""The one schema of every option, read from vLLM's `--additional-config '{"flashmemory": {...}}'`."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from flashmemory_vllm import config_text
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.own_options import (
    DECAYING_SELECTORS,
    DEFAULT_SELECTOR,
    HOLDING_SELECTORS,
    KEY_SELECTORS,
    SHARE_SELECTORS,
    IndexDtype,
    OwnOptions,
    own_options,
)

SECTION = config_text.SECTION
# What options are allowed with that only some selectors heed
_ALLOWED_WITH: Mapping[str, tuple[tuple[str, ...], str]] = {
    "memory_decay": (DECAYING_SELECTORS, "has no score that fades"),
    "question_share": (DECAYING_SELECTORS, "has no score that fades"),
    "successor_share": (SHARE_SELECTORS, "does not score by shares of attention"),
    "hysteresis": (HOLDING_SELECTORS, "does not score by shares of attention"),
    "index_dtype": (KEY_SELECTORS, "keeps no keys as they are"),
}

SelectorName = Literal["full", "streaming", "random", "mean", "bounds", "exact", "h2o", "neural"]
Aggregate = Literal["max", "mean"]
Mode = Literal["always", "pressure"]
PageChecksums = Literal["off", "sample", "full"]


def _as_tuple(value: object) -> object:
    """JSON and YAML know lists only."""
    return tuple(value) if isinstance(value, list) else value


LayerIndices = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...],
    BeforeValidator(_as_tuple),
]


class FlashMemoryConfig(BaseModel):
    """Every option of the backend. None is required.

    Attributes are documented by their `description`, from which the table in `docs/configuration.md` is made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    mode: Mode = Field(
        default="always",
        description="When requests are sparse: `always`, or under `pressure`, that is if a request, as it is admitted, "
        "would fill more than 90 % of the slots with all its blocks, and from then on until less than 70 % are "
        "reserved. It goes on as it was admitted. Not with more than one rank.",
    )
    resident_ratio: float = Field(
        default=0.135,
        gt=0,
        le=1,
        description="Share of a request's KV blocks that stays on the device while it decodes.",
    )
    tau_steps: int | None = Field(
        default=None,
        ge=1,
        description="Decode steps between two selections of a request. Unset: those that the indexer was trained for, "
        "or what suits the selector: 4 with `exact`, else 16.",
    )
    selector: Literal[SelectorName, "oracle"] = Field(
        default=DEFAULT_SELECTOR,
        description="How a request's blocks are scored: `exact` by their keys, `bounds` by per-channel key "
        "bounds, `mean` by mean keys, `h2o` by the attention they received, `neural` by a trained indexer. "
        "`streaming` keeps sink and recent tokens only; `random` and `full` (everything) are the baselines, "
        "`oracle` is for evaluation only.",
    )
    indexer: str | None = Field(
        default=None,
        description="Trained indexer: its file, a folder with `indexer.safetensors`, or a Hugging Face id. Makes the "
        "selector `neural`; anchor layers, score threshold, `query_window`, `opening_steps` and `tau_steps` are those "
        "it was trained with.",
    )
    indexer_revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of an indexer on Hugging Face. Unset: its main branch, as it is at the "
        "start of the server: all processes use the commit that was found then.",
    )
    anchor_layers: LayerIndices | None = Field(
        default=None,
        description="Layers whose queries and keys feed the selector, of full attention each, by their index among all "
        "layers of the model. Unset: three, at 1/3, 1/2 and 2/3 of the depth.",
    )
    query_window: int | None = Field(
        default=None,
        ge=1,
        description="Newest prompt tokens whose queries a request's first selection is made with, and the first one "
        "after each preemption: a block is worth what it is worth to any of them. They are computed even where a "
        "prefix hit has their KV, and their queries are kept until the request ends. Later selections are made with "
        "the last token's. Unset: what a trained indexer was trained with, else 1.",
    )
    opening_steps: int | None = Field(
        default=None,
        ge=0,
        description="Decode steps at the start of a request that each end with a selection of their own, in force in "
        "the very next step: the first generated tokens may ask for what the prompt did not. Each waits for its scores "
        "and blocks. Unset: what a trained indexer was trained with, else 0.",
    )
    aggregate: Aggregate = Field(
        default="max", description="How a block's scores over query heads and anchor layers become one."
    )
    score_threshold: float | None = Field(
        default=None,
        ge=0,
        description="Blocks that a selection scores below this get no slot, though the ratio leaves room. Scores are "
        "shares of attention in 0 to 1, of all selections so far with `h2o`. Unset: the ratio alone decides.",
    )
    memory_decay: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="What a score is still worth a token later: a block is worth the best of its scores so far, each "
        "times this for every token since. 0: a selection forgets the ones before it. Unset: 0.9 with `exact`, else 0.",
    )
    question_share: float | None = Field(
        default=None,
        ge=0,
        description="What a block stays worth beside that, as a share of its score in the first selection, which a "
        "request's question made: an answer may come late. Unset: 0.3 with `exact`, else 0.",
    )
    successor_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="What a block is worth at least, as a share of what the block before it is worth: text that is "
        "read goes on. Unset: 0.5 with `exact`, else 0.",
    )
    hysteresis: float | None = Field(
        default=None,
        ge=0,
        description="How much more a block is worth that the request holds already, as a share: what is not much "
        "better is not copied. Unset: 1 with `exact` and with an indexer that forecasts, else 0.",
    )
    index_dtype: IndexDtype | None = Field(
        default=None,
        description="How `exact`, `h2o` and an indexer that forecasts keep index keys: `auto` as the model does, `fp8` "
        "(e4m3) with a scale for each block and KV head, which is half of 16-bit keys. Unset: `auto` with `h2o`, else "
        "`fp8`.",
    )
    dense_fallback_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Keep all blocks of a request, in slots that nobody has reserved, once its selections (two or "
        "more) have scored a larger share than this of the blocks they could leave out at the score threshold or "
        "above. Unset: never. Needs `score_threshold` or `indexer`.",
    )
    sink_tokens: int = Field(default=64, ge=0, description="Tokens at the start of a request that are always resident.")
    recent_tokens: int = Field(default=256, ge=1, description="Newest tokens of a request that are always resident.")
    min_sparse_tokens: int = Field(
        default=16384,
        ge=0,
        description="Requests with fewer tokens than this keep every block and decode exactly as without us.",
    )
    prefetch_mib_per_step: int = Field(
        default=192,
        ge=1,
        description="MiB that one step prefetches at most for later selections, or a block for each request if that is "
        "more; the rest comes with the choices after it. First selections are not limited.",
    )
    layer_groups: int = Field(
        default=1,
        ge=1,
        description="Groups of consecutive layers that each choose a resident set of their own.",
    )
    host_memory_gib: float | None = Field(
        default=None,
        gt=0,
        description="GiB of host memory for KV blocks, of all ranks and data-parallel engines of the server together. "
        "Unset: half of what machine and cgroup still allow, "
        "but never more than the requests can fill.",
    )
    device_slots: int | None = Field(
        default=None,
        ge=2,
        description="Blocks the device holds, one of them reserved. Unset: what `--kv-cache-memory-bytes` or "
        "`--gpu-memory-utilization` leaves room for.",
    )
    growth_reserve_tokens: int = Field(
        default=512,
        ge=0,
        description="Tokens of growth for which a running request has slots reserved as others are admitted.",
    )
    staging_blocks: int | None = Field(
        default=None,
        ge=1,
        description="Blocks in each of the three device buffers through which prefill streams host blocks. Unset: "
        "those of 16,384 tokens, but all three at most a 32nd of the device memory for KV.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of everything that is drawn at random.")
    pin_host_memory: bool = Field(
        default=True,
        description="Pin the host pool's pages, without which copies do not overlap with compute.",
    )
    page_checksums: PageChecksums = Field(
        default="sample",
        description="Keep a checksum of every page that is written back, and compare all pages that come from the host "
        "(`full`), one of 16, in turn (`sample`), or none (`off`). A request that needs a page which is found to have "
        "another checksum fails; with `full` no such page ever becomes text.",
    )
    check_integrity: bool = Field(
        default=False, description="Check every conservation law after each step. Slow; for debugging."
    )

    poison_free_slots: bool = Field(
        default=False,
        description="Fill slots that hold no block at each step, and staging before each fetch, with NaN, so that a "
        "stray read shows. For debugging.",
    )

    @model_validator(mode="before")
    @classmethod
    def _imply_selector(cls, options: dict[str, object]) -> dict[str, object]:
        return {"selector": "neural", **options} if options.get("indexer") is not None else options

    @model_validator(mode="after")
    def _check_indexer(self) -> "FlashMemoryConfig":
        if (self.selector == "neural") != (self.indexer is not None):
            raise ConfigError(
                f"{SECTION}.selector is {self.selector!r} and {SECTION}.indexer is {self.indexer!r}: "
                "allowed is an indexer with the selector 'neural', and with no other"
            )
        if self.indexer_revision is not None and self.indexer is None:
            raise ConfigError(
                f"{SECTION}.indexer_revision is {self.indexer_revision!r}, but {SECTION}.indexer is unset: allowed "
                "with an indexer on Hugging Face"
            )
        return self

    @model_validator(mode="after")
    def _check_heeded(self) -> "FlashMemoryConfig":
        for name, (selectors, lack) in _ALLOWED_WITH.items():
            given = getattr(self, name)
            if given not in {None, 0, "auto"} and self.selector not in selectors:
                raise ConfigError(
                    f"{SECTION}.{name} is {given!r}, but {SECTION}.selector {self.selector!r} {lack}: allowed with "
                    f"{', '.join(selectors)}"
                )
        return self

    @model_validator(mode="after")
    def _check_fallback(self) -> "FlashMemoryConfig":
        if self.dense_fallback_share is not None and self.score_threshold is None and self.indexer is None:
            raise ConfigError(
                f"{SECTION}.dense_fallback_share is {self.dense_fallback_share}, but nothing says which blocks are "
                f"worth a slot: allowed with {SECTION}.score_threshold or {SECTION}.indexer"
            )
        return self

    @property
    def own(self) -> OwnOptions:
        """Options that each selector has defaults of its own for: as asked for, or those. Not what is trained."""
        suited = own_options(self.selector)._asdict()
        given = {name: value for name in suited if (value := getattr(self, name)) is not None}
        return OwnOptions(**{**suited, **given})

    def tau(self, trained: int | None) -> int:
        """Decode steps between two selections: as asked for, as trained, or what suits the selector.

        Args:
            trained: those that the indexer was trained for; None without one.
        """
        return self.tau_steps or trained or self.own.tau_steps

    @classmethod
    def from_additional_config(cls, additional_config: Mapping[str, object]) -> "FlashMemoryConfig":
        """Read the section `flashmemory` of vLLM's additional config.

        Args:
            additional_config: vLLM's `additional_config`; other sections are left alone.

        Returns:
            The options given, defaults for the rest.

        Raises:
            ConfigError: an option is unknown or its value is not allowed; the message lists every such
                option.
        """
        section = additional_config.get(SECTION, {})
        if not isinstance(section, Mapping):
            raise ConfigError(f"{SECTION} is {section!r}: allowed is a mapping of options")
        try:
            return cls.model_validate(dict(section))
        except ValidationError as error:
            raise ConfigError(
                "; ".join(config_text.explain(detail, cls.model_fields) for detail in error.errors())
            ) from None
