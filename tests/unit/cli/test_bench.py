"""`flashmemory bench` refuses what it cannot do before an engine starts, and prints and plots what there is."""

import json
from pathlib import Path

import pytest

from flashmemory_vllm.benchmark.cells import make_cells
from flashmemory_vllm.benchmark.rows import save_rows
from flashmemory_vllm.benchmark.scenario import load_scenario
from flashmemory_vllm.cli import app
from flashmemory_vllm.cli.bench import choose_cells, read_engines
from flashmemory_vllm.cli.bench_choices import model_arguments
from flashmemory_vllm.cli.shapes import SHAPES
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.reference import reference_model_path
from tests.unit.benchmark.twins import make_row

SMOKE = str(Path(__file__).parents[3] / "configs" / "bench" / "smoke.yaml")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "bench got nothing"),
        ([SMOKE], "--out is not given"),
        ([SMOKE, "--table", "rows.json"], "bench got scenarios and table"),
        (["--replot", "rows.json"], "--plot is not given"),
        (["--table", "missing.json"], "missing.json does not exist"),
        ([SMOKE, "--out", "rows.json", "--time-limit", "0"], "--time-limit is 0"),
        ([SMOKE, "--out", "rows.json", "--engines", "stock,sglang"], "--engines has 'sglang': allowed is stock, "),
        ([SMOKE, SMOKE, "--out", "rows.json"], "scenarios named smoke twice"),
        ([SMOKE, "--out", "rows.json", "--set", "engine.seed=1"], "engine.seed"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.main(["bench", *arguments]) == app.EXIT_USER_ERROR
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_engines_are_named_once_each() -> None:
    assert read_engines("flashmemory, stock,flashmemory") == ("flashmemory", "stock")


def test_one_measurement_is_chosen_by_its_scenario_and_name() -> None:
    cells = make_cells(load_scenario(Path(SMOKE)), ("stock", "flashmemory"), {"model": "m"})
    names = list(dict.fromkeys(f"{cell.scenario}/{cell.measurement}" for cell in cells))
    assert choose_cells(cells, None) == cells
    chosen = choose_cells(cells, f" {names[1]}")
    assert {f"{cell.scenario}/{cell.measurement}" for cell in chosen} == {names[1]}
    assert {cell.engine for cell in chosen} == {"stock", "flashmemory"}
    with pytest.raises(ConfigError, match=f"--only has 'smoke/none': allowed is {names[0]}"):
        choose_cells(cells, f"{names[0]},smoke/none")


def test_a_shape_is_a_folder_that_vllm_fills_with_random_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = model_arguments(None, "llama-8b")
    # The compilation cache goes by the folder, so that a second run has to name the same one
    assert arguments == model_arguments(None, "llama-8b")
    assert arguments["load_format"] == "dummy"
    fields = json.loads((Path(arguments["model"]) / "config.json").read_text())
    sizes = (fields["num_hidden_layers"], fields["hidden_size"], fields["num_key_value_heads"], fields["head_dim"])
    assert sizes == (32, 4096, 8, 128)
    assert fields["max_position_embeddings"] >= 1_000_000


def test_every_shape_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = {name: Path(model_arguments(None, name)["model"]) for name in SHAPES}
    kinds = {name: json.loads((folder / "config.json").read_text())["model_type"] for name, folder in folders.items()}
    families = {"llama-8b": "llama", "gpt-oss-20b": "gpt_oss", "qwen3-next": "qwen3_next"}
    assert kinds == families | {"deepseek-v3": "deepseek_v3"}


def test_fewer_layers_have_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = [Path(model_arguments(None, "llama-8b", num_layers)["model"]) for num_layers in (None, 2, 3)]
    assert [json.loads((folder / "config.json").read_text())["num_hidden_layers"] for folder in folders] == [32, 2, 3]
    with pytest.raises(ConfigError, match="--layers is 2 without --shape"):
        model_arguments("org/name", None, 2)


def test_the_default_model_is_the_shipped_one() -> None:
    assert model_arguments(None, None) == {"model": str(reference_model_path())}
    assert model_arguments("org/name", None) == {"model": "org/name"}


def test_rows_are_printed_and_plotted_without_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    save_rows(rows, [make_row(p50_ms=5.0, value=5.0, unit="ms/step")])
    assert app.main(["bench", "--table", str(rows)]) == 0
    assert "| flashmemory | 5 | ms/step |" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert app.main(["bench", "--replot", str(rows), "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 0
