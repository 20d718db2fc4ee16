"""What a plan counts beside the slots is what a runtime allocates there."""

from pathlib import Path

import pytest
import torch

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.indexer.shares import PASS_QUERIES, SCRATCH_ELEMS, scratch_bytes
from flashmemory_vllm.residency.batch import Batch
from flashmemory_vllm.residency.types import Phase, Row
from flashmemory_vllm.runtime.assembly import choice_sizes, table_sizes, unallocated_selector
from flashmemory_vllm.runtime.beside import beside_slots, plan_staging
from flashmemory_vllm.runtime.capacity import BesideSlots, budget_policy
from flashmemory_vllm.runtime.queries import QueryRing
from flashmemory_vllm.runtime.question import QuestionQueries
from flashmemory_vllm.runtime.shape import AttentionShape
from flashmemory_vllm.runtime.tables import StepTables
from tests.helpers.indexers import save_untrained

GIB = 1 << 30
# One layer's page of a block is 64 KiB.
SHAPE_8B = AttentionShape(tuple(map(str, range(32))), 32, 8, 128, 1.0, 16, torch.bfloat16, torch.device("cpu"))
MAX_NUM_SEQS = 5


def beside(**options: object) -> BesideSlots:
    config = FlashMemoryConfig.from_additional_config({"flashmemory": options})
    budget = budget_policy(config, block_size=16, max_num_batched_tokens=2048, max_model_len=32768)
    return beside_slots(config, SHAPE_8B, budget, MAX_NUM_SEQS, 80 * GIB)


def test_questions_take_what_as_many_requests_as_run_at_once_keep() -> None:
    questions = QuestionQueries(12, 3, SHAPE_8B)
    rows = [Row(str(index), Phase.PREFILL, 0, 100, (), (), (), ()) for index in range(MAX_NUM_SEQS)]
    questions.set_rows(Batch.of(rows, range(len(rows))), lambda _name: 100)
    kept = sum(one.queries.nbytes for one in questions._kept.values())
    assert beside(query_window=12, anchor_layers=[3, 4, 5]).question_bytes == kept > 0


@pytest.mark.parametrize("layer_groups", [1, 3])
def test_tables_take_what_is_allocated_for_them(layer_groups: int) -> None:
    names = ("block_ids", "entries", "block_table", "seq_lens", "slot_mapping", "query_row")
    for selector in ("exact", "h2o", "streaming"):
        options: dict[str, object] = {"layer_groups": layer_groups, "anchor_layers": [3, 12, 30], "selector": selector}
        config = FlashMemoryConfig.from_additional_config({"flashmemory": options})
        budget = budget_policy(config, block_size=16, max_num_batched_tokens=2048, max_model_len=32768)
        sizes = table_sizes(config, budget, MAX_NUM_SEQS, 2048)
        tables = StepTables(sizes, torch.device("cpu"))._tables
        held = [getattr(tables, name) for name in names]
        held.append(QueryRing(3, MAX_NUM_SEQS, sizes.num_kept, SHAPE_8B).all_rows)
        kind = unallocated_selector(config, SHAPE_8B).memory_kind
        chosen = choice_sizes(config, budget, kind, MAX_NUM_SEQS).num_bytes
        scratch = scratch_bytes(MAX_NUM_SEQS, sizes.width, 3 * 32) if selector != "streaming" else 0
        assert beside(**options).table_bytes == sum(tensor.nbytes for tensor in held) + chosen + scratch


def test_what_a_forecast_needs_is_counted(tmp_path: Path) -> None:
    sizes = {"num_layers": 32, "num_query_heads": 32, "num_kv_heads": 8, "head_dim": 128, "block_size": 16}
    spec = sizes | {"anchor_layers": (3, 12, 30), "chunk_size": 4, "tau": 4}
    without, forecasting = (
        beside(indexer=str(save_untrained(tmp_path / f"{len(decays)}.safetensors", memory_decays=decays, **spec)))
        for decays in ((), (0.0, 0.9, 0.98))
    )
    # Keys in fp8 with a scale for each head; four channels more, each with a weight, and three queries more in the ring
    keys = forecasting.index_bytes_per_block - without.index_bytes_per_block
    assert keys == 3 * 8 * (16 * 128 + 4)
    width = 32768 // 16 + 16  # 16 divides it
    channels, queries = 4 * 4 * (MAX_NUM_SEQS * width + 1), 3 * 3 * MAX_NUM_SEQS * 32 * 128 * 2
    assert forecasting.table_bytes - without.table_bytes == channels + queries


def test_scratch_is_as_large_as_what_is_scored_at_once() -> None:
    # Of few short requests all their log-masses; of many or long ones as much as is made at once, or those of one
    assert scratch_bytes(2, 100, 12) == 4 * 2 * 128 * 12 * PASS_QUERIES
    assert scratch_bytes(256, 512, 96) == 4 * SCRATCH_ELEMS
    assert scratch_bytes(256, 100_000, 96) == 4 * 100_032 * 96 * PASS_QUERIES


@pytest.mark.parametrize("options", [{"resident_ratio": 1.0}, {"selector": "streaming"}])
def test_nobody_pays_for_questions_that_nobody_asks(options: dict[str, object]) -> None:
    assert beside(query_window=12, **options).question_bytes == 0


@pytest.mark.parametrize(("mode", "sum_bytes"), [("off", 0), ("sample", 8), ("full", 8)])
def test_every_page_of_a_block_has_a_checksum(mode: str, sum_bytes: int) -> None:
    assert beside(page_checksums=mode).checksum_bytes_per_block == 32 * sum_bytes


@pytest.mark.parametrize(("device_bytes", "blocks"), [(80 * GIB, 1024), (6 * GIB, 1024), (3 * GIB, 512), (1, 1)])
def test_staging_follows_the_device_memory(device_bytes: int, blocks: int) -> None:
    staging = plan_staging(FlashMemoryConfig(), SHAPE_8B, device_bytes)
    assert staging == (blocks, 3 * blocks * (64 << 10))


def test_staging_asked_for_is_taken() -> None:
    assert plan_staging(FlashMemoryConfig(staging_blocks=7), SHAPE_8B, 80 * GIB).blocks == 7
