"""The forecast counts what fits, and says what keeps one more request from fitting."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.runtime.capacity import GIB
from flashmemory_vllm.runtime.forecast import Forecast, ModelSizes, ServerSizes, forecast

# 64 KiB a block of 16 tokens; a request of 32,768 tokens has 2,048 of them and 128 MiB
MODEL = ModelSizes((0, 1, 2, 3), 8, 4, 64, dtype=torch.bfloat16, kv_dtype=torch.bfloat16)
# Four layers of 576 elements, for all of eight heads
LATENTS = ModelSizes((0, 1, 2, 3), 8, 1, 576, dtype=torch.bfloat16, kv_dtype=torch.bfloat16, page_dim=576)
REQUEST_BYTES = 1 << 27
RATIO = 0.135


def make(
    device_bytes: int, host_gib: float, seqs: int = 64, ranks: int = 1, model: ModelSizes = MODEL, **options: object
) -> Forecast:
    # No index keys unless a test asks for them
    given = {"host_memory_gib": host_gib, "selector": "streaming", "staging_blocks": 1, "min_sparse_tokens": 2048}
    config = FlashMemoryConfig.from_additional_config({"flashmemory": given | options})
    return forecast(model, config, ServerSizes(device_bytes, 32768, seqs, 1024, 16, ranks))


def test_a_request_has_its_kv_and_decodes_with_its_share() -> None:
    made = make(GIB, 4.0)
    assert made.request_kv_bytes == REQUEST_BYTES
    assert made.request_decode_slots == int(RATIO * 2048)


@pytest.mark.parametrize(
    ("device_bytes", "host_gib", "seqs", "num_requests", "limit"),
    [
        # A pool of 4 GiB has room for 32 requests but for the null block
        (GIB, 4.0, 64, 31, "host blocks"),
        # 2,048 slots less the null slot and staging are seven times 276
        (GIB // 8, 4.0, 64, 7, "device slots"),
        (GIB, 4.0, 5, 5, "--max-num-seqs"),
    ],
)
def test_the_limit_is_named(device_bytes: int, host_gib: float, seqs: int, num_requests: int, limit: str) -> None:
    made = make(device_bytes, host_gib, seqs)
    assert (made.num_requests, made.limited_by) == (num_requests, limit)


def test_index_keys_on_the_device_limit_the_blocks_of_a_large_host() -> None:
    # 12,000 slots for 43 requests leave index keys of 15,228 blocks, which are those of 7
    made = make(GIB, 1000.0, seqs=64, selector="h2o", device_slots=12000)
    assert (made.num_requests, made.limited_by) == (
        7,
        "host blocks, by the device memory of their index keys and checksums",
    )


def test_dense_keeps_every_block_on_the_device() -> None:
    # vLLM's null block takes one of the 8 x 2,048
    assert make(GIB, 4.0).dense_num_requests == 7
    assert make(GIB + REQUEST_BYTES, 4.0).dense_num_requests == 8
    assert make(REQUEST_BYTES, 4.0).dense_num_requests == 0


def test_at_ratio_one_there_are_no_more_requests_than_dense() -> None:
    made = make(GIB, 100.0, resident_ratio=1.0)
    assert made.num_requests == made.dense_num_requests == 7


def test_there_is_no_plan_without_host_memory() -> None:
    with pytest.raises(ConfigError, match=r"flashmemory\.host_memory_gib is not given"):
        forecast(MODEL, FlashMemoryConfig(), ServerSizes(GIB, 32768, 8, 1024, 16))


def test_keys_and_values_have_a_dtype_of_their_own() -> None:
    server = ServerSizes(GIB, 32768, 64, 1024, 16)
    config = FlashMemoryConfig.from_additional_config({"flashmemory": {"host_memory_gib": 4.0}})
    made = forecast(replace(MODEL, kv_dtype=torch.float32), config, server)
    assert made.request_kv_bytes == 2 * REQUEST_BYTES


def test_ranks_share_heads_and_host_memory() -> None:
    one, two = make(GIB, 4.0), make(GIB, 4.0, ranks=2)
    assert two.request_kv_bytes == one.request_kv_bytes // 2
    assert two.capacity.host_bytes == one.capacity.host_bytes // 2
    assert two.capacity.num_logical_blocks == one.capacity.num_logical_blocks
    # Each rank has the same device memory, and half the bytes of a request
    assert two.dense_num_requests == 15


def test_kv_heads_are_replicated_where_there_are_fewer_than_ranks() -> None:
    assert [MODEL.of_rank(ranks).num_kv_heads for ranks in (1, 2, 4, 8)] == [4, 2, 1, 1]


@pytest.mark.parametrize(("num_kv_heads", "ranks"), [(4, 3), (4, 16), (3, 2)])
def test_heads_that_ranks_cannot_share_are_refused(num_kv_heads: int, ranks: int) -> None:
    with pytest.raises(ConfigError, match=f"--tensor-parallel-size is {ranks}: allowed is a divisor"):
        replace(MODEL, num_kv_heads=num_kv_heads).of_rank(ranks)


def test_the_mode_that_ranks_do_not_agree_on_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"flashmemory\.mode is pressure with 2 ranks"):
        make(GIB, 4.0, ranks=2, mode="pressure")


def test_an_indexer_that_needs_all_heads_is_refused_on_several_ranks() -> None:
    with pytest.raises(ConfigError, match=r"flashmemory\.indexer is 'owner/name' with 2 ranks: allowed is one rank"):
        make(GIB, 4.0, ranks=2, selector="neural", indexer="owner/name")


def test_latents_have_no_values_and_are_not_divided_among_ranks() -> None:
    one, many = (LATENTS.of_rank(ranks) for ranks in (1, 8))
    assert one.shape(16).block_bytes == many.shape(16).block_bytes == 4 * 16 * 576 * 2
    assert (one.num_query_heads, many.num_query_heads) == (8, 1)
    assert MODEL.of_rank(4).shape(16).block_bytes == MODEL.shape(16).block_bytes // 4


def test_latents_are_counted_beside_stocks() -> None:
    made = make(GIB, 4.0, model=LATENTS)
    # 4 KiB and a half a token: seven requests of 144 MiB in a GiB, in the host 28 of them but for the null block
    assert made.request_kv_bytes == 144 << 20
    assert (made.dense_num_requests, made.num_requests, made.limited_by) == (7, 28, "host blocks")


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        (2, {}, "--tensor-parallel-size is 2 with latent attention: allowed is 1, each rank would keep all latents"),
        (1, {"indexer": "some/indexer", "selector": "neural"}, "flashmemory.indexer is 'some/indexer' with latent"),
    ],
)
def test_what_a_server_refuses_beside_latents_is_not_planned(ranks: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(GIB, 4.0, ranks=ranks, model=LATENTS, **options)
    assert str(caught.value).startswith(message)
