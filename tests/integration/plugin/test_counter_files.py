"""Every process of a server finds the same files, also where each built a configuration of its own."""

from pathlib import Path

import pytest

from flashmemory_vllm.plugin.counter_files import ENGINE_ID_ENV, announce_engine, engine_counters_directory
from tests.integration.plugin.engines import make_vllm_config


@pytest.fixture(autouse=True)
def _own_runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv(ENGINE_ID_ENV, raising=False)


def test_one_api_server_shares_its_instance_id_with_the_engine() -> None:
    config = make_vllm_config("42")
    announce_engine(config)
    assert engine_counters_directory(config, 0) == engine_counters_directory(config)
    assert engine_counters_directory(config).name == "flashmemory-42-0"


def test_several_api_servers_find_the_engine_of_their_launcher() -> None:
    engine = make_vllm_config("launcher", api_process_count=2, api_process_rank=-1)
    announce_engine(engine)
    api_servers = [make_vllm_config(f"own{rank}", api_process_count=2, api_process_rank=rank) for rank in range(2)]
    assert {engine_counters_directory(config) for config in api_servers} == {engine_counters_directory(engine)}


def test_a_launcher_started_by_another_announces_its_own_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENGINE_ID_ENV, "outer")
    engine = make_vllm_config("inner", api_process_count=2, api_process_rank=-1)
    announce_engine(engine)
    api_server = make_vllm_config("own", api_process_count=2, api_process_rank=0)
    assert engine_counters_directory(api_server) == engine_counters_directory(engine)


def test_rays_suffix_of_an_engine_does_not_matter() -> None:
    engine = make_vllm_config("42_dp3")
    assert engine_counters_directory(engine, 3) == engine_counters_directory(make_vllm_config("42"), 3)
