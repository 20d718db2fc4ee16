"""Generated documents in plain English for any tokenizer: facts among filler, and a question about them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashmemory_vllm.capture.prompts import Encoder, Prompt


def _words(text: str) -> list[str]:
    return text.split("; ")


_NAMES = _words(
    "Ada; Boris; Clara; David; Elena; Felix; Greta; Henry; Irene; Jonas; Karla; Lewis; Maria; Nolan; Olive; Peter"
)
_SURNAMES = _words(
    "Adler; Brandt; Costa; Duval; Engel; Fischer; Garcia; Hansen; Ivanov; Jensen; Keller; Lindt; Moreau; Novak"
)
THINGS = _words(
    "lantern; compass; barrel; ladder; mirror; wagon; kettle; anchor; bridge; orchard; cellar; tower; canal; clock"
)
KINDS = _words(
    "copper; silver; wooden; narrow; ancient; painted; broken; hollow; northern; quiet; heavy; yellow; frozen"
)
_PLACES = _words("the harbour; the old mill; the market; the eastern gate; the library; the river bank; the hill")
_DEEDS = _words("was repaired near; had been carried past; stood all winter by; was seen from; is still kept at")
_TIMES = _words("In spring; That morning; For many years; After the storm; Before noon; Once; Later that week")

NUM_FACTS = 24
# Shares of the longest document that lengths are drawn from.
LENGTH_SHARES = (0.25, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class _Task:
    """Facts to hide and the question that needs some of them."""

    facts: tuple[str, ...]
    question: str


def _pairs(rng: random.Random, left: list[str], right: list[str], count: int) -> list[str]:
    return [f"{one} {other}" for one, other in rng.sample([(a, b) for a in left for b in right], count)]


def _needle(rng: random.Random) -> _Task:
    things = _pairs(rng, KINDS, THINGS, NUM_FACTS)
    facts = tuple(f"The secret number of the {thing} is {rng.randrange(10**5, 10**6)}." for thing in things)
    return _Task(facts, f"What is the secret number of the {rng.choice(things)}? Answer with the number.")


def _multi_hop(rng: random.Random) -> _Task:
    people = _pairs(rng, _NAMES, _SURNAMES, NUM_FACTS)
    half = NUM_FACTS // 2
    rooms = rng.sample(range(100, 1000), half)
    works = tuple(f"{one} works for {other}." for one, other in zip(people[:half], people[half:], strict=True))
    sits = tuple(f"The office of {boss} is room {room}." for boss, room in zip(people[half:], rooms, strict=True))
    asked = rng.choice(people[:half])
    return _Task(works + sits, f"In which room is the office of the person that {asked} works for? Explain briefly.")


def _key_value(rng: random.Random) -> _Task:
    keys = rng.sample(range(10**5, 10**6), NUM_FACTS)
    facts = tuple(f"Record {key}: {value}." for key, value in zip(keys, _values(rng), strict=True))
    asked = ", ".join(str(key) for key in rng.sample(keys, 4))
    return _Task(facts, f"Write down the records {asked}, one a line, each with its number.")


def _recall(rng: random.Random) -> _Task:
    facts = tuple(f"Delivery {number + 1} brought the {value}." for number, value in enumerate(_values(rng)))
    return _Task(facts, "List what every delivery brought, in the order of their numbers.")


def _values(rng: random.Random) -> list[str]:
    return _pairs(rng, KINDS, THINGS, NUM_FACTS)


_TASKS: tuple[Callable[[random.Random], _Task], ...] = (_needle, _multi_hop, _key_value, _recall)


def filler(rng: random.Random) -> str:
    """One sentence that tells nothing that is asked for."""
    thing = f"{rng.choice(KINDS)} {rng.choice(THINGS)}"
    return f"{rng.choice(_TIMES)} the {thing} {rng.choice(_DEEDS)} {rng.choice(_PLACES)}."


def text_prompts(
    encoder: Encoder,
    num_documents: int,
    num_tokens: int,
    max_tokens: int,
    seed: int,
    length_shares: Sequence[float] = LENGTH_SHARES,
) -> list[Prompt]:
    """Documents with a question at their end: needles, two hops, keys with values, and recall of everything.

    Args:
        encoder: the model's tokenizer.
        num_documents: prompts in all.
        num_tokens: tokens of the longest, about; of each, as far as its facts leave it the choice.
        max_tokens: tokens to generate at most.
        seed: of everything that is drawn.
        length_shares: shares of `num_tokens` that documents have in turn, one for each round of tasks.
    """
    prompts = []
    for number in range(num_documents):
        rng = random.Random(f"{seed} {number}")
        task = _TASKS[number % len(_TASKS)](rng)
        length = int(num_tokens * length_shares[number // len(_TASKS) % len(length_shares)])
        ids = encoder.question(_document(rng, task, encoder, length))
        prompts.append(Prompt(tuple(ids), max_tokens, group=number))
    return prompts


def _document(rng: random.Random, task: _Task, encoder: Encoder, num_tokens: int) -> str:
    lines = list(task.facts)
    left = num_tokens - len(encoder.question("\n".join([*task.facts, task.question])))
    empty = len(encoder.text(""))
    while left > 0:
        line = filler(rng)
        left -= len(encoder.text(f"\n{line}")) - empty
        lines.insert(rng.randrange(len(lines) + 1), line)
    return "\n".join([*lines, "", task.question])
