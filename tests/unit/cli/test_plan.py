"""`flashmemory plan` reads models without loading them, prints the plan twice over, and refuses in one line."""

import json
import shlex
from typing import Any

import pytest
import torch

from flashmemory_vllm.cli import app
from flashmemory_vllm.cli.plan import estimate_weights_bytes, model_sizes, read_model_fields
from flashmemory_vllm.cli.shapes import DEEPSEEK_V3, LLAMA_8B
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.reference import reference_model_path

GIB = 1 << 30
SHAPE = ("--shape", "llama-8b", "--context", "131072")
BYTES = ("--kv-cache-memory-bytes", str(8 << 30), "--host-memory-gib", "28")
LLAMA = (*SHAPE, "--gpu-memory-gib", "80", "--host-memory-gib", "128")


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert app.main(["plan", *arguments, "--json"]) == 0
    made: dict[str, Any] = json.loads(capsys.readouterr().out)
    return made


def test_weights_are_subtracted_from_the_gpu_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    made = plan_json(capsys, *LLAMA, "--weights-gib", "15")
    assert made["device_kv_bytes"] == 65 * GIB
    assert not made["weights_are_estimated"]
    assert made["request_kv_bytes"] == 16 * GIB
    assert made["dense_num_requests"] == 4
    assert made["slot_bytes"] + made["index_bytes"] + made["staging_bytes"] <= 65 * GIB
    assert made["host_bytes"] <= 128 * GIB


def test_weights_are_estimated_and_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    made = plan_json(capsys, *LLAMA)
    assert made["weights_are_estimated"]
    # The published model has 8.03 billion parameters
    assert made["device_weights_bytes"] == pytest.approx(2 * 8.03e9, rel=0.001)
    assert app.main(["plan", *LLAMA]) == 0
    assert "estimated weights 14.96" in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["gpt-oss-20b", "qwen3-next"])
def test_hybrids_of_the_benchmark_run_as_many_requests_as_it_says(
    shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """See `configs/bench/hybrids.yaml`."""
    given = ("--shape", shape, *SHAPE[2:], *BYTES, "--max-num-seqs", "8")
    made = plan_json(capsys, *given)
    assert (made["num_requests"], made["dense_num_requests"]) == (8, 2)


def test_the_estimate_is_the_size_of_the_reference_model() -> None:
    from safetensors import safe_open

    fields = read_model_fields(str(reference_model_path()))
    with safe_open(reference_model_path() / "model.safetensors", "pt") as tensors:
        stored = [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118 - no mapping
    parameters = sum(tensor.numel() for tensor in stored if tensor.dim() > 1)
    assert estimate_weights_bytes(fields, model_sizes(fields, "float32")) == 4 * parameters


def test_each_gpu_has_its_share_of_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    one, two = plan_json(capsys, *LLAMA), plan_json(capsys, *LLAMA, "--tensor-parallel-size", "2")
    assert (one["tensor_parallel_size"], two["tensor_parallel_size"]) == (1, 2)
    assert two["device_weights_bytes"] == one["device_weights_bytes"] // 2
    assert two["request_kv_bytes"] == 8 * GIB
    assert two["host_bytes"] <= 64 * GIB
    # Sixteen ranks have a KV head each, of eight
    many = plan_json(capsys, *LLAMA, "--tensor-parallel-size", "16")
    assert many["device_weights_bytes"] > one["device_weights_bytes"] // 16
    assert app.main(["plan", *LLAMA, "--tensor-parallel-size", "2"]) == 0
    assert capsys.readouterr().out.startswith("GPUs                  2, and of each of them:\n")


def test_keys_and_values_may_be_larger_than_weights(capsys: pytest.CaptureFixture[str]) -> None:
    made = plan_json(capsys, *LLAMA, "--kv-cache-dtype", "float32")
    assert made["request_kv_bytes"] == 32 * GIB
    assert made["device_weights_bytes"] == plan_json(capsys, *LLAMA)["device_weights_bytes"]


def test_table_and_json_tell_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    made = plan_json(capsys, *LLAMA)
    assert app.main(["plan", *LLAMA]) == 0
    table = capsys.readouterr().out
    assert f"{made['num_slots']:,} ({made['slot_bytes'] / GIB:.3f} GiB)" in table
    assert f"{made['num_logical_blocks']:,} ({made['host_bytes'] / GIB:.3f} GiB)" in table
    assert f"{made['num_requests']:,} (limited by {made['limited_by']})" in table
    assert f"from {made['dense_break_even_requests']:,} requests on" in table
    assert table.splitlines()[-1] == made["serve_command"]


def test_the_command_serves_what_was_planned(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"resident_ratio": 0.25, "selector": "mean", "host_memory_gib": 128}
    given = ("--kv-cache-memory-bytes", str(32 * GIB), "--max-num-seqs", "3", "--dtype", "float16")
    ranks = ("--kv-cache-dtype", "bfloat16", "--tensor-parallel-size", "2")
    made = plan_json(capsys, *SHAPE, *given, *ranks, "--options", json.dumps(options))
    words = shlex.split(made["serve_command"])
    named = dict(zip(words[3::2], words[4::2], strict=True))
    assert json.loads(named.pop("--additional-config")) == {"flashmemory": options}
    assert named == {
        "--attention-backend": "flashmemory",
        "--max-model-len": "131072",
        "--max-num-seqs": "3",
        "--max-num-batched-tokens": "8192",
        "--block-size": "16",
        "--dtype": "float16",
        "--kv-cache-dtype": "bfloat16",
        "--tensor-parallel-size": "2",
        "--kv-cache-memory-bytes": str(32 * GIB),
    }
    assert made["device_weights_bytes"] is None


def test_a_dtype_is_resolved_as_vllm_does() -> None:
    names = {
        (stored, asked): str(model_sizes(LLAMA_8B | {"dtype": stored}, asked).dtype)
        for stored, asked in (("float16", "auto"), ("float32", "auto"), (None, "auto"), ("bfloat16", "float32"))
    }
    assert model_sizes(LLAMA_8B, "float16").kv_dtype is torch.float16
    assert list(names.values()) == ["torch.float16", "torch.bfloat16", "torch.bfloat16", "torch.float32"]


def test_sizes_that_a_configuration_leaves_out_follow_from_the_others() -> None:
    fields = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 256}
    sizes = model_sizes(fields, "auto")
    assert (sizes.num_kv_heads, sizes.head_dim) == (4, 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 4096},
        {"layer_types": ["full_attention", "linear_attention"]},
        DEEPSEEK_V3 | {"layer_types": ["full_attention"] * 31 + ["linear_attention"] * 30},
        DEEPSEEK_V3 | {"sliding_window": 4096},
    ],
)
def test_models_that_the_server_refuses_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="allowed is full attention, alone or beside"):
        model_sizes(LLAMA_8B | changes, "auto")


def test_latents_are_planned_and_said_not_to_be_served_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    memory = ("--gpu-memory-gib", "80", "--weights-gib", "30", "--host-memory-gib", "128")
    given = ("--shape", "deepseek-v3", *SHAPE[2:], *memory, "--max-num-seqs", "16")
    made = plan_json(capsys, *given)
    # 61 layers, of a latent and a position 576 elements, no values
    assert made["request_kv_bytes"] == 131072 * 61 * 576 * 2
    assert made["dense_num_requests"] == 5
    assert made["num_requests"] == 14
    assert not made["is_served_on_gpu"]
    assert plan_json(capsys, *LLAMA)["is_served_on_gpu"]
    assert app.main(["plan", *given]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "GPU" in line]
    assert told == ["latent attention      not served on a GPU yet, where a server refuses to start; on a CPU it is"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "longcat_flash"}, "latent attention of a longcat_flash; allowed is that of deepseek_v2, "),
        ({"index_topk": 2048}, "latent attention of a deepseek_v3; allowed is that of deepseek_v2, "),
        ({"kv_lora_rank": 256}, "keys of 320 elements, 256 of them the latent; allowed is on a CPU 576"),
    ],
)
def test_other_latents_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_sizes(DEEPSEEK_V3 | changes, "auto")


def test_a_family_that_transformers_does_not_know_is_read_as_one_that_it_does(tmp_path: Any) -> None:
    own = {"model_type": "kimi_k2", "num_attention_heads": 64, "auto_map": {"AutoConfig": "some_file.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3 | own))
    fields = read_model_fields(str(tmp_path))
    assert fields["model_type"] == "kimi_k2"
    assert model_sizes(fields, "auto") == model_sizes(DEEPSEEK_V3 | {"num_attention_heads": 64}, "auto")


@pytest.mark.parametrize("field", ["block_configs", "per_layer_config"])
def test_models_whose_layers_differ_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"its layers differ \({field}\), allowed is one size of KV in all layers"):
        model_sizes(LLAMA_8B | {field: [{}, {}]}, "auto")


@pytest.mark.parametrize("changes", [{"num_local_experts": 8}, {"quantization_config": {"bits": 4}}, DEEPSEEK_V3])
def test_weights_that_cannot_be_estimated_are_asked_for(changes: dict[str, Any]) -> None:
    fields = LLAMA_8B | changes
    with pytest.raises(ConfigError, match="--weights-gib is not given"):
        estimate_weights_bytes(fields, model_sizes(fields, "auto"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*LLAMA, "--options", "{"), "--options is '{': allowed is a JSON object"),
        ((*LLAMA, "--options", "[]"), "--options is '[]': allowed is a JSON object"),
        ((*LLAMA, "--options", '{"tau": 3}'), "closest is flashmemory.tau_steps"),
        ((*LLAMA, "--options", '{"host_memory_gib": 1.0}'), "both given"),
        (
            (*SHAPE[:1], "gpt-oss-20b", *SHAPE[2:], *BYTES, "--options", '{"anchor_layers": [3, 4]}'),
            "anchor_layers: [4] given, allowed: 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, the layers of full",
        ),
        ((*SHAPE, "--gpu-memory-gib", "80"), "neither given"),
        ((*SHAPE, "--gpu-memory-gib", "10", "--host-memory-gib", "128"), "14.96 GiB (estimated)"),
        ((*SHAPE, "--gpu-memory-gib", "nan", "--host-memory-gib", "128"), "--gpu-memory-gib is nan"),
        ((*SHAPE, "--gpu-memory-gib", "80", "--host-memory-gib", "1"), "host_memory_gib: 1 GiB holds"),
        ((*LLAMA, "--weights-gib", "-1"), "--weights-gib is -1.0: allowed is a number > 0"),
        ((*LLAMA, "--tensor-parallel-size", "0"), "--tensor-parallel-size is 0: allowed is 1 or more"),
        (
            ("--shape", "deepseek-v3", *SHAPE[2:], *BYTES, "--tensor-parallel-size", "8"),
            "--tensor-parallel-size is 8 with latent attention: allowed is 1, each rank would keep all latents",
        ),
        ((*LLAMA, "--tensor-parallel-size", "3"), "--tensor-parallel-size is 3: allowed is a divisor"),
        ((*LLAMA, "--max-num-seqs", "0"), "--max-num-seqs is 0: allowed is 1 or more"),
        (
            (*SHAPE, "--kv-cache-memory-bytes", "9", "--weights-gib", "1", "--host-memory-gib", "1"),
            "--weights-gib: given with --kv-cache-memory-bytes",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["plan", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_folder_without_a_model_is_one_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    memory = ("--gpu-memory-gib", "80", "--host-memory-gib", "128")
    assert app.main(["plan", "--model", str(tmp_path), "--context", "4096", *memory]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"flashmemory: --model is {tmp_path}: allowed is a model's folder or id")
