"""Suite `parity`: does a sparse server write what a dense one writes, and how far apart are their distributions?

The same prompts are continued greedily by both, one at a time, so that no batch differs. Two texts are comparable up to
and including the first token at which they part: up to there both models read the same tokens. Prefill attends to
everything, so the first token is dense on both sides: its divergence is the noise between the two servers.

The dense server is asked twice. How often it agrees with itself is the most that can be expected of any other.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from statistics import fmean, median
from typing import Any

from tqdm import tqdm

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.eval_rows import Figures
from flashmemory_vllm.evaluation.needles import Questions
from flashmemory_vllm.evaluation.target import Completion, Target
from flashmemory_vllm.files import write_json

TASK = "continuation"
# Of an evaluation; the dense continuations are kept in it
PARITY_FOLDER = "parity"
# The most that vLLM tells unless its server is started with another --max-logprobs
TOP_LOGPROBS = 20
_LEAST_MASS = 1e-9


@dataclass(frozen=True, slots=True)
class Comparison:
    """Continuations of P prompts beside those of the dense server.

    Attributes:
        lengths: `[P]` tokens that the dense server wrote.
        agreeing: `[P]` tokens before the first one that differs; all of them if none does.
        identical: `[P]` whether the texts are the same, token by token, to their ends.
        kl: for each prompt, in nats, see `kl_lower_bound`, at every position whose prefix is the same, the first
            token's at index 0.
    """

    lengths: list[int]
    agreeing: list[int]
    identical: list[bool]
    kl: list[list[float]]

    @classmethod
    def of(cls, dense: Sequence[Completion], other: Sequence[Completion]) -> "Comparison":
        """Compare continuations of the same prompts, pair by pair."""
        agreeing = [_num_equal(one.token_ids, two.token_ids) for one, two in zip(dense, other, strict=True)]
        kl = [
            [
                _rounded(kl_lower_bound(p, q))
                for p, q in zip(one.logprobs[: same + 1], two.logprobs[: same + 1], strict=False)
            ]
            for one, two, same in zip(dense, other, agreeing, strict=True)
        ]
        identical = [list(one.token_ids) == list(two.token_ids) for one, two in zip(dense, other, strict=True)]
        return cls([len(one.token_ids) for one in dense], agreeing, identical, kl)

    @property
    def identical_share(self) -> float:
        """Share of texts that are the same."""
        return fmean(self.identical)

    @property
    def agreeing_share(self) -> float:
        """Tokens before the first that differs over all tokens of the dense server."""
        return sum(self.agreeing) / max(1, sum(self.lengths))

    @property
    def divergences(self) -> list[int]:
        """Positions, from 0, of the first differing token in the texts that have one."""
        return [position for position, same in zip(self.agreeing, self.identical, strict=True) if not same]

    @property
    def median_divergence(self) -> float | None:
        """Median of `divergences`; None if there are none."""
        return median(self.divergences) if self.divergences else None

    @property
    def prefill_kl(self) -> float | None:
        """Mean at the first token, which dense prefill wrote on both sides."""
        return _mean(values[0] for values in self.kl if values)

    @property
    def decode_kl(self) -> float | None:
        """Mean at the later tokens; None if there are none."""
        return _mean(value for values in self.kl for value in values[1:])

    @property
    def max_decode_kl(self) -> float | None:
        """Largest at the later tokens."""
        return max((value for values in self.kl for value in values[1:]), default=None)


def kl_lower_bound(p: Mapping[int, float], q: Mapping[int, float]) -> float:
    """Kullback-Leibler divergence of q from p as far as their likeliest tokens tell it, in nats.

    Tokens that both sides tell are events of their own, those that only p tells are one together, and all others are
    one: merging events never raises the divergence. q gives a token that it does not tell at most the probability of
    the least likely one that it tells; of what that allows, the probability with the least divergence is taken. The
    true divergence is at least this.

    Args:
        p: natural log-probability by token, of the likeliest tokens.
        q: the same of the other distribution.
    """
    shared, alone = p.keys() & q.keys(), p.keys() - q.keys()
    kept = sum(math.exp(p[token]) * (p[token] - q[token]) for token in shared)
    mass_p, mass_q = (max(_LEAST_MASS, 1 - sum(math.exp(side[token]) for token in shared)) for side in (p, q))
    if not alone:
        return max(0.0, kept + mass_p * math.log(mass_p / mass_q))
    alone_p = min(mass_p, sum(math.exp(p[token]) for token in alone))
    rest_p = max(_LEAST_MASS, mass_p - alone_p)
    alone_q = min(len(alone) * math.exp(min(q.values())), mass_q * alone_p / (alone_p + rest_p))
    rest_q = max(_LEAST_MASS, mass_q - alone_q)
    return max(0.0, kept + alone_p * math.log(alone_p / alone_q) + rest_p * math.log(rest_p / rest_q))


@dataclass(frozen=True, slots=True)
class ParityPart:
    """Continuations of some prompts of one length.

    Attributes:
        tokens: tokens of a prompt.
        max_tokens: tokens to generate at most.
        count: prompts.
        seed: of the prompts.
        questions: makes the prompts.
        folder: where the dense server's continuations wait for the sparse one's.
    """

    tokens: int
    max_tokens: int
    count: int
    seed: int
    questions: Questions
    folder: Path

    def measure(self, target: Target) -> list[Figures]:
        """Ask one server: the dense one twice, beside itself; the sparse one beside the dense one.

        Raises:
            ConfigError: a prompt is too long for the server, or the dense continuations are gone.
            FlashMemoryError: the server failed.
        """
        prompts = self.questions.continuations(self.tokens, self.count, self.seed)
        target.check_room(max(map(len, prompts)) + self.max_tokens, "--lengths and --parity-tokens")
        # Of every choice that makes the prompts: an evaluation may have several
        path = self.folder / f"dense-{self.tokens}-{self.count}x{self.max_tokens}-seed{self.seed}.json"
        if target.side == "dense":
            dense = self._ask(target, prompts)
            _save(path, dense)
        else:
            dense = _load(path)
        details = asdict(Comparison.of(dense, self._ask(target, prompts)))
        return [Figures(task=TASK, tokens=self.tokens, questions=len(prompts), details=details)]

    def _ask(self, target: Target, prompts: Sequence[Sequence[int]]) -> list[Completion]:
        label = f"parity, {target.side}, {self.tokens:,} tokens"
        progress = tqdm(prompts, desc=label, unit="text", leave=False)
        return [target.complete(prompt, self.max_tokens, TOP_LOGPROBS) for prompt in progress]


def _num_equal(one: Sequence[int], two: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def _save(path: Path, completions: Sequence[Completion]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [asdict(completion) for completion in completions], indent=None)


def _load(path: Path) -> list[Completion]:
    if not path.exists():
        raise ConfigError(f"{path} is gone: allowed is another --out, or the folder with all that the dense run wrote")

    def completion(found: dict[str, Any]) -> Completion:
        # JSON has no integer keys
        tops = [{int(token): value for token, value in top.items()} for top in found["logprobs"]]
        return Completion(found["text"], found["token_ids"], tops)

    return [completion(found) for found in json.loads(path.read_text(encoding="utf-8"))]
