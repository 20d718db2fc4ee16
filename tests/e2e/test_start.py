"""What a user sees when a server does not start: the reason, also where only a worker can tell it."""

from pathlib import Path

import pytest
import yaml

from flashmemory_vllm.cli.server import Server
from flashmemory_vllm.errors import FlashMemoryError
from flashmemory_vllm.reference import reference_model_path
from tests.e2e.conftest import CONFIG, STARTUP_SECONDS
from tests.helpers.indexers import save_untrained, spoil


def test_a_damaged_indexer_is_refused_before_a_model_is_loaded(environment: dict[str, str], tmp_path: Path) -> None:
    indexer = save_untrained(tmp_path / "toy.safetensors", num_layers=6, head_dim=64)
    spoil(indexer)
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["additional-config"]["flashmemory"]["indexer"] = str(indexer)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    server = Server(reference_model_path(), path, STARTUP_SECONDS, environment)
    with pytest.raises(FlashMemoryError) as refused, server:
        pytest.fail("the server must not start")
    message = str(refused.value)
    assert message.startswith("the server ended with code 1\n")
    told = f"ConfigError: indexer {indexer}: gate has NaN or infinite values, allowed are finite ones"
    assert message.splitlines()[-1] == told
    assert not any(word in message for word in ("Traceback", "validation error", "EngineCore"))


def test_what_only_a_worker_can_tell_is_still_readable(environment: dict[str, str], tmp_path: Path) -> None:
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8")) | {"num-gpu-blocks-override": 100_000}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    server = Server(reference_model_path(), path, STARTUP_SECONDS, environment)
    with pytest.raises(FlashMemoryError) as refused, server:
        pytest.fail("the server must not start")
    message = str(refused.value)
    assert message.startswith("the server ended with code 1\n")
    assert "ConfigError: --num-gpu-blocks-override: 100000 logical blocks, the host pool holds " in message
    assert "lower the override, or raise what limits the pool: flashmemory.host_memory_gib or --max-num-seqs" in message
