"""One `vllm serve` of the reference model for all tests here, as `flashmemory demo` starts it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from flashmemory_vllm.cli.server import MODEL_NAME, Server
from flashmemory_vllm.reference import reference_model_path
from tests.helpers.entry_points import entry_point_folder

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "reference.yaml"
STARTUP_SECONDS = 1200


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts a server."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """What a process needs to find our plugin, installed or not, to serve our routes, and to leave cores to others."""
    paths = [str(entry_point_folder()), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return dict(os.environ) | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "VLLM_PLUGINS": "flashmemory",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # vLLM binds the threads of a worker to the cores of a NUMA node, and wants a node for each worker. Where there
        # are two cores, whoever asks a server that decodes then waits for one for up to 20 s. More threads than one
        # spin while they wait for each other.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def server(environment: dict[str, str]) -> Iterator[Server]:
    """The server, up and healthy."""
    with Server(reference_model_path(), CONFIG, STARTUP_SECONDS, environment) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[OpenAI]:
    """The official client."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0) as openai:
        assert [model.id for model in openai.models.list()] == [MODEL_NAME]
        yield openai
