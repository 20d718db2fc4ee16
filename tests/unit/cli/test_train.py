"""`flashmemory train`: one command from recordings to weights that serve, and wrong options are told before it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashmemory_vllm.cli import app
from flashmemory_vllm.indexer.checkpoint import load_indexer
from tests.unit.training.recordings import Toy, write_recordings

SIZES = ["--rank", "16", "--heads", "4", "--dim", "32", "--tau", "6", "--batch", "2", "--questions", "8"]
FILES = {"indexer.safetensors", "indexer.state.pt", "indexer.md", "indexer.curves.json", "indexer.png"}
UNTRAINED = ("bounds", "mean", "streaming", "random")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_recordings(folder, Toy(documents=6, prompt_blocks=50, tokens=16))
    return folder


def _arguments(data: Path, out: Path) -> list[str]:
    return ["train", "--data", str(data), "--out", str(out), "--device", "cpu", "--epochs", "2", *SIZES]


def _run(data: Path, out: Path, *more: str) -> int:
    return app.main([*_arguments(data, out), *more])


def test_weights_card_and_curves_are_written(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "indexer.safetensors"
    assert _run(data, out, "--commit", "abc123") == 0
    assert {path.name for path in out.parent.iterdir()} == FILES
    model = load_indexer(out, torch.device("cpu"))
    assert (model.spec.tau, model.spec.delay, model.spec.rank, model.spec.model) == (6, 1, 16, "toy")
    assert model.calibration.tolist() != [1.0, 0.0]
    curves = json.loads((out.parent / "indexer.curves.json").read_text())
    assert list(curves["selectors"]) == ["neural", "held", "content", "oracle", "mix", "last", *UNTRAINED]
    assert curves["history"][0]["loss"] is None
    card = (out.parent / "indexer.md").read_text()
    best = max(row["recall@0.135"] for row in curves["history"])
    assert curves["selectors"]["neural"]["recall@0.135"] == best
    assert f"| neural | {curves['selectors']['neural']['recall@0.1']:.3f} |" in card
    assert f"| parameters | {sum(weight.numel() for weight in model.parameters()):,} |" in card
    codes, keys = 2 * 4 * (32 + 4), 2 * 2 * (16 * 16 + 4)
    assert f"| index bytes of a block | {codes + keys:,} |" in card
    assert curves["selectors"]["held"]["fetched@0.135"] <= curves["selectors"]["neural"]["fetched@0.135"]
    assert "commit abc123" in card
    assert str(out.parent / "indexer.md") in capsys.readouterr().out


def test_a_finished_run_resumes_to_the_same_weights(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "indexer.safetensors"
    assert _run(data, out) == 0
    weights = out.read_bytes()
    out.unlink()
    assert _run(data, out, "--resume") == 0
    assert out.read_bytes() == weights


@pytest.mark.slow
def test_two_processes_train_one_model(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "indexer.safetensors"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "flashmemory_vllm.cli.app", *_arguments(data, out)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert load_indexer(out, torch.device("cpu")).spec.tau == 6
    # Both take the same steps, each with half of the documents: only the first tells of it.
    assert done.stdout.count("step 0: ") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "--epochs is 0: allowed is 1 or more"),
        (["--validate-every", "-1"], "--validate-every is -1: allowed is 0 or more"),
        (["--query-window", "5"], "--query-window is 5: allowed is 1 to 4, as many as --data has"),
        (["--reach", "-1"], "--reach is -1: allowed is 0 or more"),
        (["--delay", "-1"], "--delay is -1: allowed is 0 or more"),
        (["--lr", "nan"], "--lr is nan: allowed is a number above 0"),
        (["--power", "0"], "--power is 0.0: allowed is a number above 0"),
        (["--validation-share", "1"], "--validation-share is 1.0: allowed is a number between 0 and 1"),
        (["--device", "abacus"], "--device is 'abacus': allowed is a device of torch"),
        (["--out", "weights.pt"], "--out is weights.pt: allowed is a file that ends in .safetensors"),
        (["--data", "/no/such/folder"], "/no/such/folder/meta.json does not exist"),
    ],
)
def test_a_wrong_option_is_named(
    data: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(data, tmp_path / "x.safetensors", *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("given", ["0.5,2", "much"])
def test_decays_are_numbers_from_0_to_1(
    given: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _run(data, tmp_path / "x.safetensors", "--memory-decays", given)
    assert f"{given!r}: allowed are numbers from 0 to 1" in capsys.readouterr().err


def test_without_decays_there_is_no_head(data: Path, tmp_path: Path) -> None:
    assert _run(data, tmp_path / "x.safetensors", "--memory-decays", "", "--epochs", "1", "--power", "2") == 0
    model = load_indexer(tmp_path / "x.safetensors", torch.device("cpu"))
    assert (model.head, model.spec.memory_decays) == (None, ())
    assert "memory fades a token by | none" in (tmp_path / "x.md").read_text()


def test_missing_matplotlib_is_told_before_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert _run(data, tmp_path / "x.safetensors") == 2
    assert "need matplotlib" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
