"""Inputs of `score_rows` shared by tests and benchmarks."""

import random
from typing import Literal, NamedTuple

import torch

from flashmemory_kernels.common.due_rows import Due, make_rows
from flashmemory_kernels.score_chunks.naive import quantise_codes
from flashmemory_kernels.score_rows.naive import OnlySets

Format = Literal["rows", "bounds", "fp8"]


class ScoreRowsCase(NamedTuple):
    """Rows of so many blocks, 0 for rows that are not scored, and padding behind them.

    R index rows of D elements, or of 2 D with bounds, in A layers and Hkv KV heads; Q queries kept of each place, of
    which a row has up to `num_queries`.
    """

    form: Format
    num_layers: int
    num_blocks: tuple[int, ...]
    num_padding: int
    num_heads: int
    num_kv_heads: int
    num_rows: int
    head_dim: int
    num_kept: int
    num_queries: int
    tile: int
    num_groups: int = 0


# With groups only blocks in the set gain mass.
CASES = (
    ScoreRowsCase("rows", 1, num_blocks=(1,), num_padding=0, num_heads=1, num_kv_heads=1, num_rows=1, head_dim=8,
                  num_kept=1, num_queries=1, tile=16),
    ScoreRowsCase("rows", 2, num_blocks=(0, 37, 0, 5), num_padding=2, num_heads=6, num_kv_heads=2, num_rows=5,
                  head_dim=20, num_kept=5, num_queries=4, tile=16),
    ScoreRowsCase("bounds", 2, num_blocks=(20, 3), num_padding=1, num_heads=8, num_kv_heads=2, num_rows=1,
                  head_dim=20, num_kept=7, num_queries=6, tile=32),
    ScoreRowsCase("fp8", 1, num_blocks=(18, 33), num_padding=0, num_heads=4, num_kv_heads=2, num_rows=16, head_dim=32,
                  num_kept=4, num_queries=3, tile=16),
    ScoreRowsCase("rows", 3, num_blocks=(30, 9), num_padding=0, num_heads=4, num_kv_heads=1, num_rows=2, head_dim=16,
                  num_kept=3, num_queries=2, tile=32, num_groups=2),
)  # fmt: skip

# Three anchor layers of an 8B model: a quarter of 64 rows of 6K tokens, of 8 of 32K, and one of 500K in blocks of 16;
# exact keys, the same in fp8, bounds and means.
_FORMATS: tuple[tuple[Format, int], ...] = (("rows", 16), ("fp8", 16), ("bounds", 1), ("rows", 1))
BENCH_CASES = tuple(
    ScoreRowsCase(form, 3, num_blocks=(num_blocks,) * num_rows, num_padding=0, num_heads=32, num_kv_heads=8,
                  num_rows=index_rows, head_dim=128, num_kept=5, num_queries=4, tile=64)
    for form, index_rows in _FORMATS
    for num_rows, num_blocks in ((16, 384), (2, 2048), (1, 31250))
)  # fmt: skip


class ScoreRowsInputs(NamedTuple):
    """Arguments of the op."""

    queries: torch.Tensor
    key_rows: torch.Tensor
    scales: torch.Tensor | None
    block_ids: torch.Tensor
    rows: torch.Tensor
    scale: float
    mass: torch.Tensor
    only: OnlySets | None


def make_inputs(case: ScoreRowsCase, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> ScoreRowsInputs:
    """Arguments of the op; what must not be read is NaN, and so are all masses."""
    rng, generator = random.Random(0), torch.Generator(device).manual_seed(0)
    num_places, most = len(case.num_blocks) + 1, max(case.num_blocks)
    places = rng.sample(range(num_places), len(case.num_blocks))
    ids = torch.randperm(num_places * most + 3, generator=generator, device=device)
    num_pool_blocks = len(ids)
    ids = ids[: num_places * most].view(num_places, most)
    shape = (case.num_layers, num_places, case.num_kept, case.num_heads, case.head_dim)
    drawn = torch.randn(shape, generator=generator, device=device).to(dtype)
    queries, used = torch.full_like(drawn, torch.nan), torch.zeros(num_pool_blocks, dtype=torch.bool, device=device)
    given = []
    for place, num_blocks in zip(places, case.num_blocks, strict=True):
        num_queries = rng.randint(1, case.num_queries) if num_blocks else 0
        position = rng.randint(num_queries, 100)
        newest = [(position - age) % case.num_kept for age in range(num_queries)]
        queries[:, place, newest] = drawn[:, place, newest]
        used[ids[place, :num_blocks]] = True
        known = rng.randint(0, num_blocks) if place % 2 else 0
        given.append({
            Due.PLACE: place, Due.POSITION: position, Due.NUM_QUERIES: num_queries, Due.NUM_KNOWN: known,
            Due.NUM_BLOCKS: num_blocks,
        })  # fmt: skip
    width = 2 * case.head_dim if case.form == "bounds" else case.head_dim
    index_shape = (case.num_layers, num_pool_blocks, case.num_kv_heads, case.num_rows, width)
    index, scales = torch.randn(index_shape, generator=generator, device=device, dtype=dtype), None
    index[:, ~used] = torch.nan
    if case.form == "bounds":
        index = index.unflatten(4, (2, -1)).sort(4).values.flatten(4)  # type: ignore[no-untyped-call]
    if case.form == "fp8":
        codes, scales = quantise_codes(index.flatten(3))
        index = codes.view(index_shape)
    num_tiles = sum(-(-num_blocks // case.tile) for num_blocks in case.num_blocks)
    mass_shape = (num_tiles + 1, case.num_layers * case.num_heads, case.num_queries, case.tile)
    only = None
    if case.num_groups:
        held = torch.rand(case.num_groups, num_places, most, generator=generator, device=device) < 0.4
        groups = torch.arange(case.num_layers, dtype=torch.int32, device=device) % case.num_groups
        only = OnlySets(held.to(torch.int8), groups)
    return ScoreRowsInputs(
        queries, index, scales, ids.int(), make_rows(given, len(given) + case.num_padding, case.tile).to(device), 0.3,
        torch.full(mass_shape, torch.nan, device=device), only,
    )  # fmt: skip
