"""The requests of a soak, drawn from a seed, written to a file and read again."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation import vocabulary as words
from flashmemory_vllm.evaluation.questions import answer_len, make_questions, max_questions
from flashmemory_vllm.evaluation.tasks import TASK_NAMES, Sample
from flashmemory_vllm.files import write_json
from flashmemory_vllm.soak.settings import SoakSettings

# Where there are several they are drawn with min_p = 1: greedily, in spite of vLLM's "n must be 1"
MAX_ANSWERS = 3
MAX_ABORT_STEPS = 40
QUESTIONS_OF_A_CONTEXT = 8
# In the dense phase no answer is expected: of so many prompts in 10 the length is one that is hard on blocks
ODD_LENGTHS = 4


@dataclass(frozen=True, slots=True)
class SoakRequest:
    """One request.

    Attributes:
        name: its id.
        gap_steps: engine steps after the arrival of the request before it.
        context: which of the trace's contexts its prompt begins with.
        num_context_tokens: how much of that.
        tail: token ids after it.
        max_tokens: tokens to generate at most; exactly so many where no answer is expected.
        num_answers: n, continuations of the prompt.
        adapter: number of a LoRA adapter, 0 for none.
        is_streamed: tokens are handed over as they come.
        abort_after_steps: engine steps after the arrival when its client goes away, or None.
        answer: the only right answer, or empty.
    """

    name: str
    gap_steps: int
    context: int
    num_context_tokens: int
    tail: tuple[int, ...]
    max_tokens: int
    num_answers: int
    adapter: int
    is_streamed: bool
    abort_after_steps: int | None
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """A soak from beginning to end.

    Attributes:
        settings: what it was drawn for.
        contexts: token ids that prompts begin with.
        requests: in the order of their arrival.
    """

    settings: SoakSettings
    contexts: Sequence[Sequence[int]]
    requests: Sequence[SoakRequest]

    def prompt(self, request: SoakRequest) -> list[int]:
        """Token ids of a request's prompt."""
        return [*self.contexts[request.context][: request.num_context_tokens], *request.tail]

    def save(self, path: Path) -> None:
        """Write it as JSON.

        Raises:
            StorageError: the disk is full.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self), indent=None)

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """Read what `save` wrote.

        Raises:
            ConfigError: the file is no trace.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            settings = {name: _tuples(value) for name, value in fields["settings"].items()}
            requests = [
                SoakRequest(**{name: _tuples(value) for name, value in request.items()})
                for request in fields["requests"]
            ]
            return cls(SoakSettings(**settings), fields["contexts"], requests)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no trace of a soak ({error}): allowed is what --keep wrote") from None


def _tuples(value: Any) -> Any:  # noqa: ANN401 - a value of JSON
    return tuple(value) if isinstance(value, list) else value


def draw_trace(settings: SoakSettings) -> Trace:
    """Draw a soak; the same settings give the same.

    Raises:
        ConfigError: a prompt is too short for its question, or does not fit in the engine with its answer.
    """
    rng = random.Random(settings.seed)
    contexts, samples = _draw_contexts(settings, rng)
    requests = [_draw_request(settings, rng, index, contexts, samples) for index in range(settings.num_requests)]
    longest = max(request.num_context_tokens + len(request.tail) + request.max_tokens for request in requests)
    if longest > settings.max_model_len:
        raise ConfigError(f"prompt tokens: a request of {longest}, allowed is max_model_len {settings.max_model_len}")
    return Trace(settings, contexts, requests)


def _draw_contexts(settings: SoakSettings, rng: random.Random) -> tuple[list[list[int]], list[list[Sample]]]:
    """Contexts, and the questions that each can be asked; a context has questions of one task."""
    contexts, samples = [], []
    # Texts that are only compared may begin with contexts that are too short for facts of every kind
    tasks = TASK_NAMES if settings.phase == "sparse" else TASK_NAMES[:1]
    for index in range(settings.num_contexts):
        task = tasks[index % len(tasks)]
        room = settings.max_model_len - answer_len(task)
        num_tokens = min(rng.randint(*settings.prompt_tokens), room)
        count = min(QUESTIONS_OF_A_CONTEXT, max_questions(task, num_tokens))
        asked = make_questions(task, num_tokens, count, rng.randrange(1 << 30), questions_per_context=count)
        samples.append(asked)
        contexts.append(asked[0].prompt_ids[: asked[0].num_shared_tokens].tolist())
    return contexts, samples


def _draw_request(
    settings: SoakSettings,
    rng: random.Random,
    index: int,
    contexts: Sequence[Sequence[int]],
    samples: Sequence[Sequence[Sample]],
) -> SoakRequest:
    context = rng.randrange(len(contexts))
    is_dense = settings.phase == "dense"
    if is_dense:
        num_context_tokens, tail = _odd_prompt(settings, rng, len(contexts[context]))
        max_tokens, answer = rng.randint(*settings.output_tokens), ()
    else:
        sample = rng.choice(samples[context])
        num_context_tokens = sample.num_shared_tokens
        tail = tuple(sample.prompt_ids[num_context_tokens:].tolist())
        answer = tuple(sample.answer_ids.tolist())
        max_tokens = len(answer)
    is_forked = rng.random() < settings.share_forked
    is_aborted = rng.random() < settings.share_aborted
    return SoakRequest(
        name=f"soak-{index}",
        gap_steps=int(rng.expovariate(1 / settings.gap_steps)),
        context=context,
        num_context_tokens=num_context_tokens,
        tail=tail,
        max_tokens=max_tokens,
        num_answers=rng.randint(2, MAX_ANSWERS) if is_forked else 1,
        # An adapter changes what the model says, so only a text that is compared may have one
        adapter=_draw_adapter(settings, rng) if is_dense else 0,
        is_streamed=rng.random() < settings.share_streamed,
        abort_after_steps=int(rng.triangular(0, MAX_ABORT_STEPS, 0)) if is_aborted else None,
        answer=answer,
    )


def _draw_adapter(settings: SoakSettings, rng: random.Random) -> int:
    least = 0 if settings.mixes_adapters or not settings.adapters else 1
    return rng.randint(least, settings.adapters)


def _odd_prompt(settings: SoakSettings, rng: random.Random, most: int) -> tuple[int, tuple[int, ...]]:
    """How much of a context, and what random words after it; in all whole blocks, a token more, one token, or any."""
    kind = rng.randrange(10)
    if kind >= ODD_LENGTHS:
        return rng.randint(1, most), _random_words(rng, rng.randint(0, settings.block_size))
    if kind == 0:
        return 0, _random_words(rng, rng.randint(1, 2))
    whole = rng.randint(1, max(1, most // settings.block_size)) * settings.block_size
    return min(whole, most), _random_words(rng, whole - min(whole, most) + kind - 1)


def _random_words(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(words.NOISE_0, words.NUM_WORDS) for _ in range(count))
