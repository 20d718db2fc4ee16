"""Files that say which cells of an accuracy table to measure, a few lines for each sweep."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flashmemory_vllm.config import SelectorName
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.accuracy import Cell
from flashmemory_vllm.evaluation.accuracy_rows import DENSE, NEURAL, OptionValue, Setting
from flashmemory_vllm.evaluation.tasks import TASK_NAMES, AnyTaskName
from flashmemory_vllm.own_options import own_options

ORACLE = "oracle"
DEFAULT_RATIO = 0.135

Positive = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(gt=0, le=1)]
Layers = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Threshold = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

# The resident ratio under which a setting keeps to its `device_share`
FitRatio = Callable[[Setting], float]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CellGroup(_Strict):
    """Every combination of the lists; all but `selectors` and `tokens` may be left out.

    Attributes:
        selectors: how blocks are scored. `full` is dense attention, measured once for each task, length and batch.
        tokens: tokens of the prompts.
        tasks: names of the tasks. Default: those that the reference model was trained on.
        ratios: resident ratios, with index keys on top. Default: 0.135, unless there are device shares.
        device_shares: instead of ratios, device bytes of a request, index keys included, over those of all its
            blocks. Default: none.
        taus: decode steps between two selections, null for what suits the selector. Default: that alone.
        groups: numbers of layer groups. Default: 1.
        anchor_layers: sets of layers that feed the selector, null for our default. Default: that alone.
        score_thresholds: scores below which a block gets no slot, null for the selector's own. Default: that alone.
        fallback_shares: selected shares above which a request keeps all its blocks, null for never; with a score
            threshold or the selector `neural` only. Default: never.
        query_windows: prompt tokens that a first selection is made with, null for a trained indexer's own number, and
            1 without. Default: that alone.
        opening_steps: decode steps that each end with a selection of their own, null for as many as trained, and none
            without. Default: that alone.
        batches: requests that run at once. Default: 64.
        options: further options of ours, for selectors that heed them. Default: none.
        questions: questions of each cell. Default: 200.
        indexer: trained indexer, for the selector `neural`. Default: that of the command line.
    """

    selectors: Annotated[list[SelectorName | Literal["oracle"]], Field(min_length=1)]
    tokens: Annotated[list[Positive], Field(min_length=1)]
    tasks: Annotated[list[AnyTaskName], Field(min_length=1)] = list(TASK_NAMES)
    ratios: Annotated[list[Ratio], Field(min_length=1)] = [DEFAULT_RATIO]
    device_shares: Annotated[list[Ratio], Field(min_length=1)] | None = None
    taus: Annotated[list[Positive | None], Field(min_length=1)] = [None]
    groups: Annotated[list[Positive], Field(min_length=1)] = [1]
    anchor_layers: Annotated[list[Layers | None], Field(min_length=1)] = [None]
    score_thresholds: Annotated[list[Threshold | None], Field(min_length=1)] = [None]
    fallback_shares: Annotated[list[Share | None], Field(min_length=1)] = [None]
    query_windows: Annotated[list[Positive | None], Field(min_length=1)] = [None]
    opening_steps: Annotated[list[Annotated[int, Field(ge=0)] | None], Field(min_length=1)] = [None]
    batches: Annotated[list[Positive], Field(min_length=1)] = [64]
    options: Mapping[str, OptionValue] = {}
    questions: Positive = 200
    indexer: str | None = None

    @model_validator(mode="after")
    def _check_shares(self) -> "CellGroup":
        if self.device_shares is not None and "ratios" in self.model_fields_set:
            raise ValueError(f"device_shares are {self.device_shares} and ratios {self.ratios}: allowed is one of them")
        given = [share for share in self.fallback_shares if share is not None]
        blind = [name for name in self.selectors if name not in {DENSE, NEURAL}]
        if given and blind and None in self.score_thresholds:
            raise ValueError(
                f"fallback_shares are {given} for {', '.join(blind)}, whose own scores have no threshold: "
                "allowed with score_thresholds that are all numbers"
            )
        return self

    def cells(self, indexer: str | None, fit: FitRatio) -> Iterator[Cell]:
        """The cells, dense ones first.

        Args:
            indexer: for a group with the selector `neural` that names none.
            fit: asked for the ratios of settings with a device share.

        Raises:
            ConfigError: there is no indexer for the selector `neural`.
        """
        chosen = self.indexer or indexer
        if NEURAL in self.selectors and chosen is None:
            raise ConfigError(f"--indexer is not given: the selector {NEURAL} needs a file, folder or Hugging Face id")
        for setting in self._settings(chosen):
            fitted = setting if setting.device_share is None else replace(setting, ratio=fit(setting))
            for tokens, task, batch in product(self.tokens, self.tasks, self.batches):
                yield Cell(fitted, task, tokens, self.questions, batch)

    def _settings(self, indexer: str | None) -> Iterator[Setting]:
        """Settings with a device share have that as their ratio, too, which is right without index keys."""
        if DENSE in self.selectors:
            yield Setting(DENSE, _tau(self.taus[0], DENSE), 1.0, 1)
        shares = self.device_shares
        sizes = [(ratio, None) for ratio in self.ratios] if shares is None else [(share, share) for share in shares]
        ways = product(
            *(sizes, self.taus, self.groups, self.anchor_layers, self.score_thresholds, self.fallback_shares),
            *(self.query_windows, self.opening_steps),
        )
        for (ratio, share), tau, groups, layers, threshold, fallback, window, opening in ways:
            anchors = None if layers is None else tuple(sorted(set(layers)))
            for selector in dict.fromkeys(self.selectors):
                if selector != DENSE:
                    yield Setting(
                        selector,
                        _tau(tau, selector),
                        ratio,
                        groups,
                        anchors,
                        indexer if selector == NEURAL else None,
                        threshold,
                        fallback,
                        share,
                        window,
                        opening,
                        tuple(sorted(self.options.items())),
                    )


def _tau(given: int | None, selector: str) -> int:
    return own_options(selector).tau_steps if given is None else given


class AccuracyPlan(_Strict):
    """One file.

    Attributes:
        why: the question that it answers, in a sentence.
        cells: what to measure; a cell that several groups name is measured once.
    """

    why: str
    cells: Annotated[list[CellGroup], Field(min_length=1)]


def cells_of(groups: Sequence[CellGroup], indexer: str | None, fit: FitRatio) -> list[Cell]:
    """All cells of the groups, each once; see `CellGroup.cells`."""
    return list(dict.fromkeys(cell for group in groups for cell in group.cells(indexer, fit)))


def load_plan(path: Path) -> AccuracyPlan:
    """Read a plan.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown, missing or not allowed; all are listed.
    """
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--plan: {path} cannot be read: {str(error).splitlines()[0]}") from None
    try:
        return AccuracyPlan.model_validate(fields)
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, detail['loc'])) or 'file'}: {detail['msg']} (given: {detail['input']!r})"
            for detail in error.errors()
        )
        raise ConfigError(f"--plan: {path}: {reasons}") from None
