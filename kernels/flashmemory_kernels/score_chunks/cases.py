"""Inputs of `score_chunks` shared by tests and benchmarks."""

import random
from typing import NamedTuple

import torch

from flashmemory_kernels.common import Aggregate
from flashmemory_kernels.common.due_rows import Due, make_rows
from flashmemory_kernels.score_chunks.naive import Ensemble, quantise_codes


class ChunkCase(NamedTuple):
    """Rows of so many blocks, 0 for rows that are not scored, and padding behind them.

    C chunks of a block, the last `reach` of which speak for the next one, each with a code of E in the layers of the
    groups, under H index heads of up to `num_queries` queries.
    """

    layer_groups: tuple[int, ...]
    num_blocks: tuple[int, ...]
    num_padding: int
    chunks_per_block: int
    reach: int
    num_heads: int
    width: int
    num_queries: int = 1
    aggregate: Aggregate = "max"


CASES = (
    ChunkCase((0,), num_blocks=(1,), num_padding=0, chunks_per_block=1, reach=0, num_heads=1, width=8),
    ChunkCase((1, 0, 1), num_blocks=(0, 23, 0, 5), num_padding=2, chunks_per_block=3, reach=2, num_heads=6, width=20,
              num_queries=4, aggregate="mean"),
    ChunkCase((0, 0), num_blocks=(140, 33), num_padding=0, chunks_per_block=4, reach=2, num_heads=16, width=128),
    ChunkCase((0, 0, 1), num_blocks=(9, 2), num_padding=1, chunks_per_block=64, reach=1, num_heads=4, width=32,
              num_queries=3),
)  # fmt: skip

# Three anchor layers of an 8B model in chunks of four tokens and blocks of 16: a quarter of 64 rows of 6K tokens, of 8
# of 32K, one of 500K, and the question of one of 32K.
BENCH_CASES = tuple(
    ChunkCase((0, 0, 0), num_blocks=(num_blocks,) * num_rows, num_padding=0, chunks_per_block=4, reach=2, num_heads=32,
              width=128, num_queries=num_queries)
    for num_rows, num_blocks, num_queries in ((16, 384, 1), (2, 2048, 1), (1, 31250, 1), (1, 2048, 16))
)  # fmt: skip


class ChunkInputs(NamedTuple):
    """Arguments of the op."""

    heads: torch.Tensor
    gates: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    block_ids: torch.Tensor
    rows: torch.Tensor
    ensemble: Ensemble
    logits: torch.Tensor


def make_inputs(case: ChunkCase, dtype: torch.dtype = torch.float32, device: str = "cpu") -> ChunkInputs:
    """Arguments of the op; what must not be read is NaN, and so are all logits.

    Heads differ in size by up to 10^6, gates by as much the other way: every head has a say in the logits. In the last
    row that is scored the first query has NaN in one layer, and a chunk has it as its scale.
    """
    rng, generator = random.Random(0), torch.Generator(device).manual_seed(0)
    num_layers, num_rows = len(case.layer_groups), len(case.num_blocks) + case.num_padding
    num_places, most = len(case.num_blocks) + 1, max(case.num_blocks)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    factor = torch.logspace(-3, 3, case.num_heads, device=device)
    heads = draw(num_rows, case.num_queries, num_layers, case.num_heads, case.width) * factor.unsqueeze(-1)
    gates = draw(num_rows, case.num_queries, num_layers, case.num_heads) / factor
    ids = torch.randperm(num_places * most + 3, generator=generator, device=device)
    used, num_pool_blocks = torch.zeros(len(ids), dtype=torch.bool, device=device), len(ids)
    ids = ids[: num_places * most].view(num_places, most)
    places, given, broken = rng.sample(range(num_places), len(case.num_blocks)), [], None
    for line, (place, num_blocks) in enumerate(zip(places, case.num_blocks, strict=True)):
        num_queries = rng.randint(1, case.num_queries) if num_blocks else 0
        heads[line, num_queries:], gates[line, num_queries:] = torch.nan, torch.nan
        used[ids[place, :num_blocks]] = True
        given.append({Due.PLACE: place, Due.NUM_QUERIES: num_queries, Due.NUM_BLOCKS: num_blocks})
        if num_queries:
            broken = line, ids[place, num_blocks // 2]
    codes, scales = quantise_codes(draw(num_layers, num_pool_blocks, case.chunks_per_block, case.width))
    # The one NaN of e4m3, without its sign.
    codes.view(torch.uint8)[:, ~used] = 0x7F
    scales[:, ~used] = torch.nan
    if broken is not None:
        heads[broken[0], 0, -1, 0] = torch.nan
        scales[0, broken[1], -1] = torch.nan
    ensemble = Ensemble(
        draw(num_layers), draw(num_layers), draw(num_layers, case.reach),
        torch.tensor(case.layer_groups, dtype=torch.int32, device=device), case.aggregate,
    )  # fmt: skip
    logits = torch.full((max(case.layer_groups) + 1, num_places, most), torch.nan, device=device)
    rows = make_rows(given, num_rows, tile=1).to(device)
    return ChunkInputs(heads.to(dtype), gates.to(dtype), codes, scales, ids.int(), rows, ensemble, logits)
