"""Random haystacks that hold needles, value groups and variable chains, built a whole batch at a time."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation import vocabulary as words

Ids = npt.NDArray[np.int32]

KEY_WORDS = 2
VALUE_WORDS = 3
VALUES_PER_GROUP = 3
# Lengths of `NEEDLE k k v v v .`, of `NEEDLE k k #i v v v .` and of `LET a a b b .`
NEEDLE_LEN = 2 + KEY_WORDS + VALUE_WORDS
GROUP_NEEDLE_LEN = NEEDLE_LEN + 1
LET_LEN = 2 + 2 * KEY_WORDS
GROUP_LEN = VALUES_PER_GROUP * GROUP_NEEDLE_LEN
CHAIN_LEN = LET_LEN + NEEDLE_LEN


@dataclass(frozen=True, slots=True)
class ContextShape:
    """How many facts a context holds; the rest of it is noise."""

    num_needles: int
    num_groups: int
    num_chains: int

    @property
    def fact_tokens(self) -> int:
        """Tokens that the facts take up."""
        return self.num_needles * NEEDLE_LEN + self.num_groups * GROUP_LEN + self.num_chains * CHAIN_LEN

    @classmethod
    def filling(cls, num_tokens: int, share: float, *, only_needles: bool = False) -> "ContextShape":
        """Facts for about `share` of `num_tokens`: half needles, a quarter each groups and chains."""
        budget = int(num_tokens * share)
        num_groups = 0 if only_needles else budget // 4 // GROUP_LEN
        num_chains = 0 if only_needles else budget // 4 // CHAIN_LEN
        rest = budget - num_groups * GROUP_LEN - num_chains * CHAIN_LEN
        return cls(rest // NEEDLE_LEN, num_groups, num_chains)


@dataclass(frozen=True, slots=True)
class ContextBatch:
    """A batch of contexts of one shape. Item order: needles, chain targets, group needles, lets.

    Attributes:
        tokens: `[B, C]` token ids, without `<bos>`.
        shape: the facts that every row holds.
        keys: `[B, P, 2]` key words of the needles, chain targets, groups and chain heads.
        values: `[B, V, 3]` value words of the needles, chain targets and group needles.
        starts: `[B, I]` index in `tokens` at which each item starts.
        lengths: `[I]` tokens of each item.
    """

    tokens: Ids
    shape: ContextShape
    keys: Ids
    values: Ids
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    def span(self, row: int, item: int) -> tuple[int, int]:
        """Token range `[start, stop)` of one item in the tokens of a row."""
        start = int(self.starts[row, item])
        return start, start + int(self.lengths[item])


def unique_keys(rng: np.random.Generator, batch_size: int, num_keys: int) -> Ids:
    """Key pairs `[B, P, 2]`, no pair twice in a row."""
    num_pairs = words.NUM_KEY_WORDS**KEY_WORDS
    codes = np.stack([rng.choice(num_pairs, num_keys, replace=False) for _ in range(batch_size)])
    pairs = np.stack(np.divmod(codes, words.NUM_KEY_WORDS), axis=-1)
    return (words.KEY_0 + pairs).astype(np.int32)


def _column(token: int | npt.NDArray[np.integer], like: Ids) -> Ids:
    """`token` broadcast to the items of `like` `[B, I, W]`, as one more word `[B, I, 1]`."""
    return np.broadcast_to(np.asarray(token, np.int32), like.shape[:2])[..., None]


def _spell_items(shape: ContextShape, keys: Ids, values: Ids) -> list[Ids]:
    """The words of all items, one array `[B, I, W]` for each kind of item."""
    num_plain = shape.num_needles + shape.num_chains
    group_end = num_plain + shape.num_groups
    plain_keys, heads = keys[:, :num_plain], keys[:, group_end:]
    group_keys = np.repeat(keys[:, num_plain:group_end], VALUES_PER_GROUP, axis=1)
    ordinals = words.VALUE_ORDINAL_0 + np.tile(np.arange(VALUES_PER_GROUP), shape.num_groups)
    targets = plain_keys[:, shape.num_needles :]

    def spell(*parts: int | npt.NDArray[np.integer], like: Ids) -> Ids:
        columns = [part if isinstance(part, np.ndarray) and part.ndim == 3 else _column(part, like) for part in parts]
        return np.concatenate(columns, axis=-1)

    return [
        spell(words.NEEDLE, plain_keys, values[:, :num_plain], words.STOP, like=plain_keys),
        spell(words.NEEDLE, group_keys, ordinals, values[:, num_plain:], words.STOP, like=group_keys),
        spell(words.LET, heads, targets, words.STOP, like=heads),
    ]


def scatter_starts(
    rng: np.random.Generator, batch_size: int, num_tokens: int, lengths: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Random starts `[B, I]` such that the items overlap in no row: random order, random noise gaps."""
    num_noise = num_tokens - int(lengths.sum())
    order = rng.random((batch_size, len(lengths))).argsort(axis=1)
    noise_before = np.sort(rng.integers(0, num_noise + 1, order.shape), axis=1)
    ordered_lengths = lengths[order]
    ordered_starts = noise_before + ordered_lengths.cumsum(axis=1) - ordered_lengths
    starts: npt.NDArray[np.int64] = np.empty_like(ordered_starts)
    np.put_along_axis(starts, order, ordered_starts, axis=1)
    return starts


def build_contexts(rng: np.random.Generator, batch_size: int, num_tokens: int, shape: ContextShape) -> ContextBatch:
    """Build a batch of random contexts that hold the same kinds of facts.

    Args:
        rng: the only source of randomness.
        batch_size: rows.
        num_tokens: tokens of each context.
        shape: facts of each context.

    Returns:
        Contexts of exactly `num_tokens` tokens; keys are unique within a context.

    Raises:
        ConfigError: the facts do not fit into `num_tokens`.
    """
    if shape.fact_tokens > num_tokens:
        raise ConfigError(f"context of {num_tokens} tokens is too short: its facts take {shape.fact_tokens} tokens")
    num_plain = shape.num_needles + shape.num_chains
    keys = unique_keys(rng, batch_size, num_plain + shape.num_groups + shape.num_chains)
    num_values = num_plain + shape.num_groups * VALUES_PER_GROUP
    value_words = rng.integers(0, words.NUM_VALUE_WORDS, (batch_size, num_values, VALUE_WORDS), dtype=np.int32)
    values = words.VALUE_0 + value_words
    items = _spell_items(shape, keys, values)
    lengths = np.concatenate([np.full(kind.shape[1], kind.shape[2], np.int64) for kind in items])
    starts = scatter_starts(rng, batch_size, num_tokens, lengths)
    tokens = words.NOISE_0 + rng.integers(0, words.NUM_NOISE_WORDS, (batch_size, num_tokens), dtype=np.int32)
    rows = np.arange(batch_size)[:, None, None]
    first = 0
    for kind in items:
        kind_starts = starts[:, first : first + kind.shape[1], None]
        tokens[rows, kind_starts + np.arange(kind.shape[2])] = kind
        first += kind.shape[1]
    return ContextBatch(tokens, shape, keys, values, starts, lengths)
