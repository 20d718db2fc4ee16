"""What the doctor says of models: with windows, with states, with neither, and of those that the server refuses."""

from collections.abc import Sequence
from typing import Any

import pytest

from flashmemory_vllm.cli import app, doctor, plan
from flashmemory_vllm.cli.doctor_model import model_findings
from flashmemory_vllm.doctor import device
from flashmemory_vllm.doctor.finding import Finding
from tests.helpers.published import published_fields


@pytest.fixture(autouse=True)
def _published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "read_model_fields", published_fields)


def findings(name: str, *arguments: str) -> list[Finding]:
    return list(model_findings(app.build_parser().parse_args(["doctor", "--model", name, *arguments])))


def test_a_model_of_one_kind_of_layers_has_no_native_blocks() -> None:
    (found,) = findings("llama-3.1-8b")
    assert (found.status, found.remedy) == ("ok", "")
    assert found.found == "32 layers of full attention, 128 KiB for a token, are managed, and no others"


def test_windows_and_states_are_told_with_what_they_take() -> None:
    layers, native = findings("gpt-oss-20b", "--max-num-seqs", "64", "--max-num-batched-tokens", "4096")
    assert layers.found.endswith("24 KiB for a token, are managed; 12 with a window of 128 tokens stay on the device")
    # 64 requests of 9 blocks and a prompt of two steps, in blocks of 384 KiB: see docs/capacity.md
    assert (native.check, native.status) == ("windows and states", "ok")
    assert native.found.startswith("0.40 GiB of one GPU's KV memory for 64 requests, 0.19 of it for a prompt in steps")
    layers, native = findings("qwen3-next-80b", "--max-num-seqs", "32")
    assert "; 36 with a state stay on the device" in layers.found
    assert ("0.00 of it" in native.found, native.status) == (True, "ok")


def test_large_steps_beside_windows_are_warned_of() -> None:
    arguments = ("--max-num-seqs", "8", "--max-num-batched-tokens")
    assert findings("gemma-3-27b", *arguments, "1024")[1].status == "ok"
    native = findings("gemma-3-27b", *arguments, "8192")[1]
    assert native.status == "warn"
    assert native.remedy.startswith("lower --max-num-batched-tokens")


def test_a_context_within_the_window_leaves_full_attention_alone() -> None:
    (found,) = findings("gemma-3-27b", "--context", "1024")
    assert found.found.startswith("62 layers of full attention")


def test_latents_are_managed_on_a_cpu_and_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "device_count", lambda: 0)
    (found,) = findings("deepseek-v3")
    # 61 layers of 576 elements of two bytes
    told = "61 layers of latent attention (on a CPU only), 68.625 KiB for a token, are managed, and no others"
    assert (found.status, found.found) == ("ok", told)
    monkeypatch.setattr(device, "device_count", lambda: 1)
    managed, refused = findings("deepseek-v3")
    assert managed == found
    assert (refused.check, refused.status) == ("latent attention", "fail")
    assert refused.found.startswith("not served on a GPU yet")


def test_a_model_that_is_refused_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    chunked = {**published_fields("llama-3.1-8b"), "layer_types": ["chunked_attention"] * 32}
    monkeypatch.setattr(plan, "read_model_fields", lambda _: chunked)
    (found,) = findings("chunked")
    assert (found.status, "layers of chunked_attention" in found.found) == ("fail", True)


@pytest.mark.parametrize("option", ["--context", "--max-num-seqs", "--max-num-batched-tokens", "--block-size"])
def test_a_number_that_means_nothing_is_refused(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "diagnose", _nothing)
    assert app.main(["doctor", "--model", "gpt-oss-20b", option, "0"]) == app.EXIT_USER_ERROR
    assert f"{option} is 0: allowed is 1 or more" in capsys.readouterr().err


def test_a_model_is_told_after_the_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "diagnose", _nothing)
    assert app.main(["doctor", "--model", "gpt-oss-20b"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[:1]] == ["model"]


def _nothing(*_: Any) -> Sequence[Finding]:
    return []
