"""What cannot be served correctly is refused with one message: the option, what was given and what is allowed.

All of it before a model is loaded: the tests build the engine's configuration as `vllm serve` does, and stop there.
"""

import re
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import vllm
from vllm.config import KVTransferConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

import flashmemory_vllm
from flashmemory_vllm.cli.block_size import CPU_MULTIPLE
from flashmemory_vllm.errors import ConfigError, UnsupportedError
from flashmemory_vllm.host_memory import available_host_bytes
from flashmemory_vllm.plugin import checks
from flashmemory_vllm.plugin.backends.cpu import FlashMemoryCpuImpl
from flashmemory_vllm.plugin.checks import prepare_config, read_config
from tests.helpers.indexers import save_untrained, spoil
from tests.integration.configurations import configure, refusal

# By a name of ours: architecture, model type, what differs from SIZES, the reason we give
OTHER_MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "sliding window": ("MistralForCausalLM", "mistral", {"sliding_window": 1024}, "sliding window of 1024 tokens"),
    "windows in all of several kinds of layers": (
        "Gemma3ForCausalLM",
        "gemma3_text",
        {"sliding_window": 512, "layer_types": ["sliding_attention"] * 2, "query_pre_attn_scalar": 16},
        "sliding window of 512 tokens",
    ),
    "chunked attention": (
        "Llama4ForCausalLM",
        "llama4_text",
        {"attention_chunk_size": 512, "num_local_experts": 2, "intermediate_size_mlp": 128},
        "attention in chunks of 512 tokens",
    ),
    "state space": ("MambaForCausalLM", "mamba", {"state_size": 16}, "no attention"),
    "states of which nothing is told": (
        "FalconH1ForCausalLM",
        "falcon_h1",
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
        "states beside attention, in layers whose kinds it does not tell",
    ),
    "encoder-decoder": (
        "WhisperForConditionalGeneration",
        "whisper",
        {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2},
        "encoder-decoder",
    ),
    "alibi": ("BloomForCausalLM", "bloom", {"n_head": 4, "n_layer": 2, "seq_length": 2048}, "ALiBi position biases"),
}
OURS_AND_ALLOWED = [
    (
        {"tau_step": 4},
        "flashmemory.tau_step is no option (given: 4): closest is flashmemory.tau_steps, unset or an integer >= 1",
    ),
    ({"tau_steps": "4"}, "flashmemory.tau_steps is '4': allowed is unset or an integer >= 1"),
    ({"resident_ratio": 0.0}, "flashmemory.resident_ratio is 0.0: allowed is a number > 0 and <= 1"),
    ({"resident_ratio": 1.5}, "flashmemory.resident_ratio is 1.5: allowed is a number > 0 and <= 1"),
    ({"tau_steps": 0}, "flashmemory.tau_steps is 0: allowed is unset or an integer >= 1"),
    ({"layer_groups": 3}, "flashmemory.layer_groups: 3 given, allowed: 1 to 2 (attention layers)"),
    ({"anchor_layers": [0, 2]}, "flashmemory.anchor_layers: [2] given, allowed: 0 to 1"),
]
ENGINE_AND_ALLOWED: list[tuple[dict[str, Any], str, str]] = [
    (
        {"kv_transfer_config": KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")},
        "--kv-transfer-config: set",
        "no KV connector",
    ),
    (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        "--speculative-config: ngram",
        "no speculative decoding, by --spec-method or a speculator as --model neither",
    ),
    (
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 4},
        "--decode-context-parallel-size: 2",
        "1",
    ),
    ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size: 2", "1"),
    ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size: 2", "1"),
    ({"enable_dbo": True}, "--enable-dbo: True", "dual batch overlap off"),
    (
        {"scheduler_reserve_full_isl": False},
        "--no-scheduler-reserve-full-isl: given",
        "unset: admitted by the whole prompt",
    ),
    ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype: fp8", "auto, which is float32, the model's dtype"),
    ({"kv_cache_dtype": "float16"}, "--kv-cache-dtype: float16", "auto, which is float32, the model's dtype"),
    (
        {"kv_cache_dtype": "float16", "dtype": "bfloat16"},
        "--kv-cache-dtype: float16",
        "auto or bfloat16, the model's dtype",
    ),
    (
        {"attention_config": {"backend_per_kind": {"full_attention": "FLASH_ATTN"}}},
        "--attention-config.backend_per_kind: full_attention",
        "unset: one backend for all layers",
    ),
    ({"attention_config": {"use_non_causal": True}}, "--attention-config.use_non_causal: True", "causal attention"),
    ({"ubatch_size": 2}, "--ubatch-size: 2", "1"),
    ({"runner": "pooling"}, "--runner: pooling", "generate"),
]

pytestmark = pytest.mark.usefixtures("plugin_here")


def test_a_plain_model_is_accepted_and_gets_our_worker(llama: Path) -> None:
    assert configure(llama).parallel_config.worker_cls == "flashmemory_vllm.plugin.workers.cpu.FlashMemoryCpuWorker"


def test_blocks_are_the_smallest_unless_others_are_asked_for(llama: Path) -> None:
    sizes = [configure(llama, block_size=given).cache_config.block_size for given in (None, 64, 128)]
    assert sizes == [CPU_MULTIPLE, 64, 128]
    message = str(refusal(llama, block_size=16))
    assert message == f"--block-size is 16: allowed on a CPU are multiples of {CPU_MULTIPLE}"


def test_another_backend_is_left_alone(llama: Path) -> None:
    nonsense = {"flashmemory": {"no_such_option": 1}}
    engine = EngineArgs(
        model=str(llama), skip_tokenizer_init=True, kv_cache_dtype="fp8", additional_config=nonsense
    ).create_engine_config()
    assert "flashmemory" not in engine.parallel_config.worker_cls
    assert engine.cache_config.block_size == 128


@pytest.mark.parametrize(("options", "message"), OURS_AND_ALLOWED, ids=lambda value: str(value)[:40])
def test_our_options(llama: Path, options: dict[str, Any], message: str) -> None:
    error = refusal(llama, options)
    assert isinstance(error, ConfigError)
    assert str(error) == message


@pytest.mark.parametrize(("engine", "given", "allowed"), ENGINE_AND_ALLOWED, ids=lambda value: str(value)[:30])
def test_engine_options(llama: Path, engine: dict[str, Any], given: str, allowed: str) -> None:
    error = refusal(llama, **engine)
    assert isinstance(error, UnsupportedError)
    assert str(error) == f"{given} is not supported with --attention-backend flashmemory; allowed: {allowed}"


def test_a_draft_model(llama: Path) -> None:
    draft = {"model": str(llama), "num_speculative_tokens": 2}
    message = str(refusal(llama, speculative_config=draft))
    assert message.startswith(f"--speculative-config: draft_model with {llama} is not supported")


def test_hisparse(llama: Path) -> None:
    """VLLM refuses it on a CPU before it asks us, so we are asked directly."""
    config = configure(llama)
    config.attention_config.hisparse_config = object()
    with pytest.raises(UnsupportedError, match=r"hisparse_config: set is not supported .* allowed: no HiSparse"):
        prepare_config(config)


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("", "diffusion_config", object(), "--diffusion-config: decoding by diffusion"),
        ("aux_output_config", "enable_return_routed_experts", True, "--enable-return-routed-experts: True"),
        ("model_config", "is_mm_prefix_lm", True, "(attention in both directions over images)"),
        ("model_config.hf_config", "dual_chunk_attention_config", {}, "(dual chunk attention)"),
    ],
)
def test_what_only_other_kinds_of_models_have(llama: Path, part: str, name: str, value: object, message: str) -> None:
    """VLLM refuses it for this model before it asks us, so we are asked directly."""
    config = configure(llama)
    holder = attrgetter(part)(config) if part else config
    setattr(holder, name, value)
    with pytest.raises(UnsupportedError, match=rf"{re.escape(message)} is not supported .* allowed: "):
        prepare_config(config)


def test_another_worker_class(llama: Path) -> None:
    message = str(refusal(llama, worker_cls="my.Worker"))
    assert message.startswith("--worker-cls: my.Worker conflicts with --attention-backend flashmemory")
    assert "flashmemory_vllm.plugin.workers.cpu.FlashMemoryCpuWorker" in message


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_models_with_other_attention(save_model: Callable[[Mapping[str, Any]], Path], kind: str) -> None:
    architecture, model_type, sizes, reason = OTHER_MODELS[kind]
    model = save_model({"architectures": [architecture], "model_type": model_type, **sizes})
    assert str(refusal(model)) == (
        f"model: {model} ({reason}) is not supported with --attention-backend flashmemory; "
        "allowed: decoder-only models with plain full attention in every layer"
        + (", or --disable-sliding-window for requests no longer than that" if "sliding window" in reason else "")
    )


def test_soft_capped_logits(llama: Path) -> None:
    """No model's configuration tells; the layer does, before weights are loaded."""
    refused = pytest.raises(UnsupportedError, match=r"uses logit soft-capping; allowed .* causal full attention")
    with set_current_vllm_config(configure(llama)), refused:
        FlashMemoryCpuImpl(4, 32, 1.0, 2, None, None, "auto", logits_soft_cap=30.0)


def test_more_host_memory_than_there_is(llama: Path) -> None:
    message = str(refusal(llama, {"host_memory_gib": 100000.0}))
    assert message.startswith("flashmemory.host_memory_gib: 100000.0 given, allowed: at most ")
    assert f"(limited by {available_host_bytes().limited_by})" in message


def test_host_memory_for_less_than_one_request(llama: Path) -> None:
    assert str(refusal(llama, {"host_memory_gib": 0.001})) == (
        "flashmemory.host_memory_gib: 0.001 GiB holds 65 blocks of 16384 bytes, but one request of --max-model-len "
        "8192 needs 257 (0.003922 GiB); give more host memory or lower --max-model-len"
    )


@pytest.mark.parametrize(
    ("options", "engine", "given"),
    [
        ({"device_slots": 20}, {}, r"flashmemory\.device_slots: 20 makes 20"),
        ({}, {"kv_cache_memory_bytes": 1 << 20}, r"--kv-cache-memory-bytes: 1048576 bytes of device memory makes \d+"),
    ],
    ids=["slots", "bytes"],
)
def test_too_few_slots_for_one_request(
    llama: Path, options: dict[str, Any], engine: dict[str, Any], given: str
) -> None:
    """The longest request takes 65 slots for a prefill chunk of 2,048 tokens that begins and ends within a block."""
    needed = r" slots, but one request of --max-model-len 8192 needs 66 \(\d+ bytes with all beside them\)"
    advice = (
        "give more, lower --max-model-len or --max-num-batched-tokens, or lower flashmemory.min_sparse_tokens (2048) "
        "or flashmemory.resident_ratio (0.135)"
    )
    message = str(refusal(llama, {"min_sparse_tokens": 2048, **options}, **engine))
    assert re.fullmatch(f"{given}{needed}; {re.escape(advice)}", message)


def test_more_slots_than_the_device_memory_holds(llama: Path) -> None:
    message = str(refusal(llama, {"device_slots": 250}, kv_cache_memory_bytes=4 << 20))
    assert message.startswith("flashmemory.device_slots: 250 is more than the ")
    assert (
        "that 4194304 bytes of device memory leaves beside staging, questions, tables, and index keys and checksums of"
        in message
    )


@pytest.mark.parametrize(
    ("differences", "message"),
    [
        ({"num_layers": 4}, "was trained for a model of 4 attention layers, this one has 2"),
        (
            {"num_kv_heads": 4, "head_dim": 8},
            "was trained for 'toy' with num_kv_heads 4 (served: 2), head_dim 8 (served: 16)",
        ),
        (
            {"chunk_size": 24, "block_size": 48},
            "has chunks of 24 tokens, --block-size is 32: allowed are multiples of 24",
        ),
    ],
    ids=["depth", "heads", "block size"],
)
def test_an_indexer_for_another_model(llama: Path, tmp_path: Path, differences: dict[str, Any], message: str) -> None:
    path = save_untrained(tmp_path / "toy.safetensors", **differences)
    error = refusal(llama, {"indexer": str(path)})
    assert isinstance(error, ConfigError)
    assert f"indexer {str(path)!r} {message}" in str(error).replace("indexer: ", "indexer ")


def test_a_damaged_indexer(llama: Path, tmp_path: Path) -> None:
    path = save_untrained(tmp_path / "toy.safetensors")
    spoil(path)
    not_finite = f"indexer {path}: gate has NaN or infinite values, allowed are finite ones"
    assert str(refusal(llama, {"indexer": str(path)})) == not_finite
    path.write_bytes(path.read_bytes()[:-1])
    assert str(refusal(llama, {"indexer": str(path)})).startswith(f"indexer {path} cannot be read: ")
    path.unlink()
    assert str(refusal(llama, {"indexer": str(path)})).startswith(f"indexer is {str(path)!r}: allowed is a file, ")


def test_an_indexer_of_the_hub_is_the_same_commit_in_every_process(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--owner--name" / "snapshots" / commit
    folder.mkdir(parents=True)
    save_untrained(folder / "indexer.safetensors")
    asked = []

    def fetch(repo_id: str, filename: str, revision: str | None) -> str:
        asked.append((repo_id, revision))
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    given = {"indexer": "owner/name", "indexer_revision": "v1"}
    found = configure(llama, given)
    assert read_config(found).indexer_revision == commit
    assert given["indexer_revision"] == "v1"
    assert (asked[0], set(asked[1:])) == (("owner/name", "v1"), {("owner/name", commit)})


def test_an_indexer_on_two_ranks(llama: Path, tmp_path: Path) -> None:
    path = save_untrained(tmp_path / "toy.safetensors")
    assert str(refusal(llama, {"indexer": str(path)}, tensor_parallel_size=2)) == (
        f"flashmemory.indexer: {path} with 2 ranks is not supported with --attention-backend flashmemory; "
        "allowed: one rank, or unset"
    )


@pytest.mark.parametrize(("options", "warned"), [({}, []), ({"tau_steps": 64}, []), ({"tau_steps": 16}, [16])])
def test_another_tau_than_the_trained_one_is_told(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    warned: list[int],
) -> None:
    told: list[str] = []
    monkeypatch.setattr(checks.logger, "warning_once", lambda message, *values: told.append(message % values))
    path = save_untrained(tmp_path / "toy.safetensors")
    configure(llama, {"indexer": str(path), **options})
    assert told == [
        f"flashmemory.tau_steps is {tau}, but the indexer {path} was trained for 64: it then scores for another number "
        "of steps than its selections are in force. Leave flashmemory.tau_steps unset, or set it to 64"
        for tau in warned
    ]


def test_another_vllm(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    assert str(refusal(llama)) == "vllm: installed version is 0.33.0, flashmemory-vllm supports 0.32.x"


def test_another_vllm_goes_on_without_us(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    flashmemory_vllm.register()
    other = EngineArgs(model=str(llama), skip_tokenizer_init=True).create_engine_config()
    assert "flashmemory" not in str(other.parallel_config.worker_cls)


def test_a_vllm_function_with_other_parameters(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu_worker import Worker

    def execute_model(self: Worker, batch: object) -> None:
        """Took `scheduler_output`."""

    monkeypatch.setattr(Worker, "execute_model", execute_model)
    message = str(refusal(llama))
    assert message.startswith("vllm: this build differs from 0.32 where flashmemory hooks in: ")
    assert "gpu_worker:Worker.execute_model has parameters ['self', 'batch']" in message


def test_a_vllm_function_that_is_gone(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    monkeypatch.delattr(GPUModelRunner, "_get_slot_mappings")
    assert "gpu_model_runner:GPUModelRunner._get_slot_mappings" in str(refusal(llama))


def test_a_vllm_dataclass_without_a_field_of_ours(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.output import NewRequestData

    fields = {name: field for name, field in NewRequestData.__dataclass_fields__.items() if name != "block_ids"}
    monkeypatch.setattr(NewRequestData, "__dataclass_fields__", fields)
    assert "sched.output:NewRequestData lacks ['block_ids']" in str(refusal(llama))
