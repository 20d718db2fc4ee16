"""Questions in plain English for any tokenizer: a secret code at each depth of a generated document."""

import random
from collections.abc import Sequence

from flashmemory_vllm.capture.prompts import Encoder
from flashmemory_vllm.capture.text_prompts import KINDS, THINGS, filler, text_prompts
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.needles import Needle

# Several tokens in every vocabulary: prefill, which is dense, only writes the first one.
CODE_GROUPS = 3
ANSWER_TOKENS = 64
# So many are added, or a prompt could have a few less than asked for and be too short for the server to be sparse.
MARGIN_TOKENS = 64


class TextQuestions:
    """Questions in English; prompts have as many tokens as asked for, or up to a line more.

    Args:
        encoder: the model's tokenizer.
    """

    language = "english"

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def needles(self, tokens: int, depths: Sequence[float], seed: int) -> list[Needle]:
        """One document, asked for the code at each depth; see `evaluation.needles.Questions`.

        Raises:
            ConfigError: the codes do not fit, or there are more depths than things to hide.
        """
        rng = random.Random(f"needles {seed} {tokens}")
        names = [f"{kind} {thing}" for kind in KINDS for thing in THINGS]
        if len(depths) > len(names):
            raise ConfigError(f"--depths is {len(depths)}: allowed are up to {len(names)}")
        things = rng.sample(names, len(depths))
        codes = [" ".join(str(rng.randrange(1000, 10000)) for _ in range(CODE_GROUPS)) for _ in depths]
        facts = [f"The secret code of the {thing} is {code}." for thing, code in zip(things, codes, strict=True)]
        document = self._document(rng, tokens, depths, facts)
        return [
            Needle(self._encoder.question(self._asking(document, thing)), code, ANSWER_TOKENS)
            for thing, code in zip(things, codes, strict=True)
        ]

    def continuations(self, tokens: int, count: int, seed: int) -> list[Sequence[int]]:
        """Documents with questions of four kinds; see `evaluation.needles.Questions`."""
        prompts = text_prompts(self._encoder, count, tokens + MARGIN_TOKENS, 1, seed, length_shares=(1.0,))
        return [prompt.ids for prompt in prompts]

    def _document(self, rng: random.Random, tokens: int, depths: Sequence[float], facts: Sequence[str]) -> str:
        empty = len(self._encoder.text(""))
        left = tokens + MARGIN_TOKENS - len(self._encoder.question(self._asking("\n".join(facts), "")))
        if left <= 0:
            raise ConfigError(
                f"--lengths has {tokens}: the facts of {len(facts)} --depths take {tokens - left} tokens, allowed is "
                "more"
            )
        lines = []
        while left > 0:
            lines.append(filler(rng))
            left -= len(self._encoder.text(f"\n{lines[-1]}")) - empty
        places = [round(depth * len(lines)) for depth in depths]
        # From the last place on, so that the earlier ones stay where they are
        for place, fact in sorted(zip(places, facts, strict=True), reverse=True):
            lines.insert(place, fact)
        return "\n".join(lines)

    def _asking(self, document: str, thing: str) -> str:
        return f"{document}\n\nWhat is the secret code of the {thing}? Answer with the sentence that tells it."
