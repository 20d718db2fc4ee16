"""What `flashmemory soak` makes of its arguments."""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from flashmemory_vllm.cli import soak
from flashmemory_vllm.cli.app import build_parser, main
from flashmemory_vllm.cli.soak import read_settings
from flashmemory_vllm.soak.adapter import RANK, write_adapter
from flashmemory_vllm.soak.drive import Text
from flashmemory_vllm.soak.process import HANG_MARK, SoakFolder, worker_environment
from flashmemory_vllm.soak.rows import load_rows
from flashmemory_vllm.soak.trace import Trace
from tests.unit.soak.traces import trace

SHIM = ("--triton-cpu", "shim")


def _arguments(*words: str) -> argparse.Namespace:
    return build_parser().parse_args(["soak", "--out", "rows.json", *words])


def test_every_phase_on_every_runner_with_every_scheduling_shares_requests() -> None:
    cells = read_settings(
        _arguments("--runners", "v2,v1", "--scheduling", "async,sync", "--requests", "2000", "--seed", "7", *SHIM),
        "cpu",
    )
    assert len({(cell.phase, cell.runner, cell.is_async) for cell in cells}) == len(cells) == 8
    assert [cell.num_requests for cell in cells] == [250] * 8
    assert [cell.seed for cell in cells] == list(range(7, 15))


def test_what_is_given_replaces_what_suits_the_device() -> None:
    (cell,) = read_settings(
        _arguments("--phases", "sparse", "--ratio", "0.2", "--dtype", "float16", "--selector", "exact", "--eager"),
        "cuda",
    )
    assert (cell.resident_ratio, cell.dtype, cell.is_eager) == (0.2, "float16", True)
    assert cell.options["selector"] == "exact"
    (known,) = read_settings(_arguments("--phases", "sparse"), "cuda")
    assert (known.resident_ratio, known.dtype, known.is_eager) == (0.135, "bfloat16", False)
    assert known.uses_shipped_indexer
    assert "selector" not in known.options


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--runners", "v3"), "--runners has 'v3': allowed is v1, v2"),
        (("--phases", "dense,wet"), "--phases has 'wet': allowed is dense, sparse"),
        (("--scheduling", ""), "--scheduling has '': allowed is sync, async"),
        (("--runners", "v2"), "--runners has v2 and there is no CUDA: allowed with --triton-cpu FOLDER"),
        (("--max-loras", "3"), "--max-loras is 3: allowed are 0 to --adapters, 2"),
        (("--seconds", "0"), "--seconds is 0.0: allowed is a number > 0"),
        (("--requests", "-1"), "--requests is -1: allowed is a number > 0"),
    ],
)
def test_what_is_not_allowed_is_told(
    words: tuple[str, ...],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["soak", "--out", str(tmp_path / "rows.json"), *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "option"),
    [(("--runners", "v2", *SHIM), "--runners"), (("--seed", "0"), "--seed"), (("--eager",), "--eager")],
)
def test_a_trace_that_is_played_again_decides_what_it_was_drawn_by(
    words: tuple[str, ...], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace(num_requests=2).save(tmp_path / "trace.json")
    given = ["--out", str(tmp_path / "rows.json"), "--replay", str(tmp_path / "trace.json")]
    assert main(["soak", *given, *words]) == 2
    assert f"{option}: given with --replay, whose trace decides that" in capsys.readouterr().err


def test_a_trace_of_the_second_runner_needs_on_a_cpu_what_that_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    trace(num_requests=2, runner="v2").save(tmp_path / "trace.json")
    assert main(["soak", "--out", str(tmp_path / "rows.json"), "--replay", str(tmp_path / "trace.json")]) == 2
    assert "trace.json has v2 and there is no CUDA: allowed with --triton-cpu FOLDER" in capsys.readouterr().err


def test_what_was_kept_of_an_earlier_soak_is_not_judged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command twice, as `--keep` invites; the second time the engine does not start."""
    failures = iter([None, None, "serve: no engine"])

    def run_worker(folder: SoakFolder, task: str, env: Mapping[str, str]) -> str | None:
        del env
        failure = next(failures)
        assert not folder.log.exists() or task == "judge", "a hang of before would be this one's"
        folder.log.write_text(HANG_MARK)
        if task == "serve" and failure is None:
            folder.keep(Text("soak-0", 0, (1, 2)))
            folder.write("outcome", {"added": 2})
        return failure

    monkeypatch.setattr(soak, "run_worker", run_worker)
    trace(num_requests=2).save(tmp_path / "trace.json")
    out, kept = tmp_path / "rows.json", tmp_path / "kept"
    for _ in range(2):
        main(["soak", "--out", str(out), "--keep", str(kept), "--replay", str(tmp_path / "trace.json")])
    first, second = load_rows(out)
    assert (first.requests, first.texts, first.error) == (2, 1, None)
    assert (second.requests, second.texts, second.error, second.hangs) == (0, 0, "serve: no engine", 0)
    assert Trace.load(kept / "0-dense-v1-sync" / "trace.json") == Trace.load(tmp_path / "trace.json")


def test_only_the_engine_under_test_has_our_plugin_and_on_a_cpu_only_its_second_runner_is_interpreted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    first, second = read_settings(_arguments("--phases", "dense", "--runners", "v1,v2", *SHIM), "cpu")
    assert "TRITON_INTERPRET" not in worker_environment(first, "cpu", "serve", Path("shim"))
    served, judged = (worker_environment(second, "cpu", task, Path("shim")) for task in ("serve", "judge"))
    assert (served["VLLM_PLUGINS"], served["VLLM_USE_V2_MODEL_RUNNER"], served["TRITON_INTERPRET"]) == (
        "flashmemory",
        "1",
        "1",
    )
    assert (judged["VLLM_PLUGINS"], judged["VLLM_USE_V2_MODEL_RUNNER"]) == ("", "0")
    assert served["PYTHONPATH"].split(os.pathsep)[0] == "shim"
    assert "TRITON_INTERPRET" not in judged
    # Or a process grows by 300 MiB, whatever leaks
    assert int(served["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) <= 64
    assert "shim" not in judged.get("PYTHONPATH", "")
    assert worker_environment(second, "cuda", "judge", None)["VLLM_USE_V2_MODEL_RUNNER"] == "1"


def test_as_many_adapters_as_there_are_or_as_asked_for_are_in_a_batch() -> None:
    cells = [read_settings(_arguments("--phases", "dense", *words), "cpu")[0] for words in ((), ("--max-loras", "1"))]
    assert [(cell.adapters, cell.engine["max_loras"]) for cell in cells] == [(2, 2), (2, 1)]
    (without,) = read_settings(_arguments("--phases", "dense", "--adapters", "0"), "cpu")
    assert "enable_lora" not in without.engine


def test_an_adapter_fits_its_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    folder = write_adapter(tmp_path, tmp_path / "adapter", 1)
    tensors = load_file(folder / "adapter_model.safetensors")
    place = "base_model.model.model.layers.2.self_attn"
    assert len(tensors) == 3 * 2 * 2
    assert tensors[f"{place}.q_proj.lora_A.weight"].shape == (RANK, 32)
    assert tensors[f"{place}.v_proj.lora_B.weight"].shape == (16, RANK)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == RANK
