"""Options that suit a selector where none are given: each has its own."""

from typing import Final, Literal, NamedTuple

IndexDtype = Literal["auto", "fp8"]

# Whose scores are shares of attention, or sums of them: 0 or more
SHARE_SELECTORS = ("mean", "bounds", "exact", "h2o")
# Of them, those that take what earlier tokens paid into account if asked to; h2o adds up in any case
DECAYING_SELECTORS = ("mean", "bounds", "exact")
# Whose index is the model's keys, each by itself; that of an indexer is so beside its codes if it forecasts
KEY_SELECTORS = ("exact", "h2o", "neural")
# Who may prefer what is held
HOLDING_SELECTORS = (*SHARE_SELECTORS, "neural")


class OwnOptions(NamedTuple):
    """Options of the same names, in force or to be.

    Attributes:
        tau_steps: decode steps between two selections.
        memory_decay: what a score is still worth a token later.
        question_share: what a block stays worth of its score by the question.
        successor_share: what a block hands on to the next one.
        hysteresis: how much more a block is worth that is held.
        index_dtype: how index keys are kept.
    """

    tau_steps: int = 16
    memory_decay: float = 0.0
    question_share: float = 0.0
    successor_share: float = 0.0
    hysteresis: float = 0.0
    index_dtype: IndexDtype = "auto"


DEFAULT_SELECTOR: Final = "exact"
_OWN = {
    "exact": OwnOptions(
        tau_steps=4, memory_decay=0.9, question_share=0.3, successor_share=0.5, hysteresis=1.0, index_dtype="fp8"
    ),
    "neural": OwnOptions(index_dtype="fp8"),
}


def own_options(selector: str) -> OwnOptions:
    """What a selector is served with by default."""
    return _OWN.get(selector, OwnOptions())
