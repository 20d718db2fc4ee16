"""Suite `loss`: what a sparse KV cache costs a language model on text, in nats a token above dense attention.

Both servers prefill the same windows of text and are then forced along the tokens that follow, one decode step each;
the loss of a token is minus its raw log-probability. Texts of one's own take the place of tasks, and nothing depends on
what the model would have written. The first of the forced tokens comes from prefill, which is dense on both sides.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import sqrt
from statistics import fmean, stdev

from tqdm import tqdm

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.eval_rows import EvalRow, Evaluation, Figures
from flashmemory_vllm.evaluation.standard import run_all
from flashmemory_vllm.evaluation.target import FORCED_TOKENS, Target

TASK = "loss"
# Loss by position is kept as means over so many tokens
POSITIONS = 16


@dataclass(frozen=True, slots=True)
class Losses:
    """What one server makes of D documents, forced along `steps` tokens each.

    Attributes:
        steps: forced tokens of a document, the first one among them.
        first: `[D]` loss of the first token, which comes from prefill.
        losses: `[D][B]` means over `POSITIONS` tokens each, from the second token on; the last one over what is left.
        likeliest: share of the tokens from the second on that were the likeliest.
        fetched_blocks: blocks that came from host memory, a token; None if the server does not tell.
    """

    steps: int
    first: list[float]
    losses: list[list[float]]
    likeliest: float
    fetched_blocks: float | None = None

    @property
    def weights(self) -> list[int]:
        """`[B]` tokens of each mean."""
        rest = self.steps - 1
        return [min(POSITIONS, rest - start) for start in range(0, rest, POSITIONS)]

    @property
    def means(self) -> list[float]:
        """`[D]` mean loss of each document, from the second token on."""
        return [_weighted(of_one, self.weights) for of_one in self.losses]


@dataclass(frozen=True, slots=True)
class LossLine:
    """A sparse server beside a dense one on the same text.

    Attributes:
        tokens: tokens of a prompt.
        documents: D.
        steps: forced tokens of each.
        dense: mean loss of the dense server, nats a token.
        gap: loss of the sparse server above it, mean over the documents.
        stderr: standard error of `gap`; None of one document.
        positions: the same gap by position, `[B]`, see `Losses`.
        fetched_blocks: see `Losses`.
        resident_share: see `EvalRow`.
        is_sparse: whether decode steps left out blocks.
    """

    tokens: int
    documents: int
    steps: int
    dense: float
    gap: float
    stderr: float | None
    positions: list[float]
    fetched_blocks: float | None
    resident_share: float | None
    is_sparse: bool

    @property
    def name(self) -> str:
        """What was compared, in words."""
        return f"loss at {self.tokens:,} tokens"

    @classmethod
    def of(cls, dense: EvalRow, sparse: EvalRow) -> "LossLine":
        """Compare two rows of the same documents, document by document."""
        one, other = Losses(**dense.details), Losses(**sparse.details)
        gaps = [b - a for a, b in zip(one.means, other.means, strict=True)]
        by_position = [
            fmean(b - a for a, b in zip(column, column_other, strict=True))
            for column, column_other in zip(zip(*one.losses, strict=True), zip(*other.losses, strict=True), strict=True)
        ]
        return cls(
            tokens=sparse.tokens,
            documents=len(gaps),
            steps=other.steps,
            dense=fmean(one.means),
            gap=fmean(gaps),
            stderr=stdev(gaps) / sqrt(len(gaps)) if len(gaps) > 1 else None,
            positions=by_position,
            fetched_blocks=other.fetched_blocks,
            resident_share=sparse.resident_share,
            is_sparse=sparse.is_sparse,
        )


def loss_lines(evaluation: Evaluation) -> list[LossLine]:
    """A line for each length that both servers were forced along."""
    return [LossLine.of(dense, sparse) for dense, sparse in evaluation.pairs() if sparse.suite == "loss"]


@dataclass(frozen=True, slots=True)
class LossPart:
    """Documents of one length.

    Attributes:
        tokens: tokens of a prompt.
        documents: `[D][tokens + steps]` token ids.
        num_concurrent: documents that are forced at once.
    """

    tokens: int
    documents: Sequence[Sequence[int]]
    num_concurrent: int

    def measure(self, target: Target) -> list[Figures]:
        """Force one server along all documents.

        Raises:
            ConfigError: a document is too long for the server, or the server forces no tokens.
            FlashMemoryError: the server failed.
        """
        steps = len(self.documents[0]) - self.tokens
        target.check_room(self.tokens + steps, "--lengths and --loss-tokens")
        before = target.read_fetched()
        forced: list[tuple[list[float], list[bool]]] = [([], []) for _ in self.documents]
        label = f"loss, {target.side}, {self.tokens:,} tokens"
        with tqdm(total=len(self.documents), desc=label, unit="text", leave=False) as progress:
            asks = [partial(self._ask, target, ids, into) for ids, into in zip(self.documents, forced, strict=True)]
            for _ in run_all(asks, self.num_concurrent):
                progress.update()
        after = target.read_fetched()
        num_decoded = len(self.documents) * (steps - 1)
        hits = [hit for _, of_one in forced for hit in of_one[1:]]
        losses = Losses(
            steps=steps,
            first=[round(of_one[0], 5) for of_one, _ in forced],
            losses=[
                [round(fmean(of_one[at : at + POSITIONS]), 5) for at in range(1, steps, POSITIONS)]
                for of_one, _ in forced
            ],
            likeliest=round(fmean(hits), 5),
            fetched_blocks=None if before is None or after is None else round((after - before) / num_decoded, 4),
        )
        return [Figures(task=TASK, tokens=self.tokens, questions=len(self.documents), details=asdict(losses))]

    def _ask(self, target: Target, ids: Sequence[int], into: tuple[list[float], list[bool]]) -> None:
        prompt, forced = ids[: self.tokens], list(ids[self.tokens :])
        answer = target.complete(prompt, len(forced), logprobs=1, forced=forced)
        if list(answer.token_ids) != forced:
            raise ConfigError(
                f"the {target.side} server at {target.url} wrote other tokens than it was forced to; allowed is one "
                f"started with --logits-processors {FORCED_TOKENS}"
            )
        if all(told[token] == 0 for token, told in zip(forced, answer.logprobs, strict=True)):
            raise ConfigError(
                f"the {target.side} server at {target.url} says that all it was forced to write was certain: it tells "
                "logprobs after the forcing; allowed is one with --logprobs-mode raw_logprobs, the default"
            )
        for token, told in zip(forced, answer.logprobs, strict=True):
            into[0].append(-told[token])
            into[1].append(told[token] >= max(told.values()))


def _weighted(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
