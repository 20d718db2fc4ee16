"""A request seven times as large as the device tensor is served; stock vLLM with the same memory refuses to start."""

from math import ceil
from typing import Any

import pytest
import yaml
from openai import OpenAI

from flashmemory_vllm.cli.server import MODEL_NAME, Server
from flashmemory_vllm.reference import reference_model_path
from tests.e2e.conftest import CONFIG
from tests.e2e.questions import make_questions
from tests.helpers.engine import EngineRun, run_engine

NUM_TOKENS = 32768
ENGINE: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
OURS = ("attention-backend", "additional-config")


def test_a_32k_request_is_seven_times_the_device_tensor_and_answered(client: OpenAI, server: Server) -> None:
    (question,) = make_questions("multikey", NUM_TOKENS, 1, seed=0)
    before = server.read_metrics()
    answer = client.completions.create(model=MODEL_NAME, prompt=question.prompt, max_tokens=16, temperature=0)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == NUM_TOKENS
    assert answer.choices[0].text.strip() == question.answer

    after = server.read_metrics()
    grown = {
        name: after[f"flashmemory:{name}_total"] - before[f"flashmemory:{name}_total"]
        for name in ("written_back_blocks", "written_back_bytes", "decode_resident_blocks", "decode_context_blocks")
    }
    num_blocks = ceil(NUM_TOKENS / ENGINE["block-size"])
    assert grown["written_back_blocks"] == num_blocks
    num_device_blocks = after["flashmemory:slots_total"] + 1  # the null slot is memory too
    assert num_blocks >= 7 * num_device_blocks
    assert grown["decode_resident_blocks"] / grown["decode_context_blocks"] == pytest.approx(0.135, abs=0.002)
    # With index keys and staging, which are large for a model of six layers, of which three are anchors
    assert grown["written_back_bytes"] >= 2 * ENGINE["kv-cache-memory-bytes"]


def test_stock_vllm_with_the_same_device_memory_refuses_to_start() -> None:
    engine = {name.replace("-", "_"): value for name, value in ENGINE.items() if name not in OURS}
    with pytest.raises(AssertionError) as refused:
        run_engine(EngineRun(model=reference_model_path(), rounds=[[[1, 2, 3]]], max_tokens=1, engine=engine))
    message = str(refused.value)
    assert "max seq len (33792)" in message
    assert "larger than the available KV cache memory" in message
