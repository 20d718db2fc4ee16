"""The 2,048 words of the reference language: what training, evaluation and the tokenizer agree on."""

from collections.abc import Iterator
from itertools import product

NUM_WORDS = 2048

SPECIAL_WORDS = ("<pad>", "<bos>", "<end>", "<user>", "<assistant>", "<system>", "<unk>")
PAD, BOS, END, USER, ASSISTANT, SYSTEM, UNK = range(len(SPECIAL_WORDS))

_CONTROL_WORDS = (".", "NEEDLE", "LET", "ASK", "EACH", "LIST", "TRACE", "LATER")
STOP, NEEDLE, LET, ASK, EACH, LIST, TRACE, LATER = range(len(SPECIAL_WORDS), len(SPECIAL_WORDS) + len(_CONTROL_WORDS))

NUM_ORDINALS = 8
NUM_COUNTS = 160
NUM_KEY_WORDS = 512
NUM_VALUE_WORDS = 512

VALUE_ORDINAL_0 = LATER + 1
QUERY_ORDINAL_0 = VALUE_ORDINAL_0 + NUM_ORDINALS
COUNT_0 = QUERY_ORDINAL_0 + NUM_ORDINALS
KEY_0 = COUNT_0 + NUM_COUNTS
VALUE_0 = KEY_0 + NUM_KEY_WORDS
NOISE_0 = VALUE_0 + NUM_VALUE_WORDS
NUM_NOISE_WORDS = NUM_WORDS - NOISE_0

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"


def _pseudo_words(pattern: str, count: int, stride: int) -> Iterator[str]:
    """Spell `count` distinct words of a consonant/vowel pattern; the stride is coprime to their number."""
    letters = [_CONSONANTS if kind == "c" else _VOWELS for kind in pattern]
    spellings = ["".join(word) for word in product(*letters)]
    return (spellings[index * stride % len(spellings)] for index in range(count))


def _all_words() -> tuple[str, ...]:
    words = [*SPECIAL_WORDS, *_CONTROL_WORDS]
    words += [f"#{index + 1}" for index in range(NUM_ORDINALS)]
    words += [f"@{index + 1}" for index in range(NUM_ORDINALS)]
    words += [f"c{index}" for index in range(NUM_COUNTS)]
    words += _pseudo_words("cvcv", NUM_KEY_WORDS, stride=1867)
    words += _pseudo_words("cvcvc", NUM_VALUE_WORDS, stride=26921)
    words += _pseudo_words("cvc", NUM_NOISE_WORDS, stride=367)
    return tuple(words)


WORDS = _all_words()
_ID_OF_WORD = {word: index for index, word in enumerate(WORDS)}


def encode(text: str) -> list[int]:
    """Token ids of whitespace-separated words; an unknown word becomes `<unk>`."""
    return [_ID_OF_WORD.get(word, UNK) for word in text.split()]


def decode(token_ids: list[int]) -> str:
    """Text of token ids, words separated by one space."""
    return " ".join(WORDS[token_id] for token_id in token_ids)
