"""KV becomes NaN in host memory: its request fails and says so, those beside it and its next try are right."""

from pathlib import Path

import pytest
import torch

from tests.helpers.broken_kv import ask_around_a_broken_block, assert_the_request_failed_alone
from tests.helpers.tiny_model import save_tiny_llama

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CUDA build has no CPU backend"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"), num_layers=2)


def test_full_with_two_ranks_where_only_a_page_of_the_second_is_broken(model: Path) -> None:
    two_ranks = {"tensor_parallel_size": 2}
    assert_the_request_failed_alone(ask_around_a_broken_block(model, "full", engine=two_ranks))


def test_full_with_model_runner_v2_and_two_layer_groups_where_only_one_is_broken(model: Path) -> None:
    assert_the_request_failed_alone(ask_around_a_broken_block(model, "full", "v2", is_async=True, layer_groups=2))


def test_off_nobody_notices(model: Path) -> None:
    """What the tests above would see without the checksums: another text, and no word about it."""
    result = ask_around_a_broken_block(model, "off")
    assert result["again"]["finish"] == "length"
    assert result["again"]["tokens"] != result["first"]["tokens"]
    assert result["counters"]["compared_pages_total"] == 0
