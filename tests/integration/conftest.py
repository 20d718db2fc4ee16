"""What tests of engine configurations share; vLLM is imported by those that use it only."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def plugin_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our plugin in this process, and models looked at in it: vLLM does so in a subprocess, of ten seconds each."""
    from vllm.model_executor.models import registry

    import flashmemory_vllm

    flashmemory_vllm.register()
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[[Mapping[str, Any]], Path]:
    """Write a model folder that has a configuration and no weights."""
    from tests.integration.configurations import save_config

    return lambda config: save_config(tmp_path, config)


@pytest.fixture
def llama(save_model: Callable[[Mapping[str, Any]], Path]) -> Path:
    """A model that we serve."""
    from tests.integration.configurations import LLAMA

    return save_model(LLAMA)
