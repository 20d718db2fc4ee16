"""Training lowers the loss and finds needed blocks, repeats under a seed, and goes on as if never stopped."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashmemory_vllm.errors import ConfigError, StorageError
from flashmemory_vllm.evaluation.worth import worth
from flashmemory_vllm.indexer.neural_model import NeuralIndexer
from flashmemory_vllm.training.dataset import TrainingData
from flashmemory_vllm.training.processes import Processes
from flashmemory_vllm.training.settings import TrainSettings, make_spec
from flashmemory_vllm.training.trainer import Trainer, TrainResult, learning_rate_share
from flashmemory_vllm.training.validation import Validation
from tests.helpers.disk import full_disk
from tests.unit.training.recordings import Toy, write_recordings

SETTINGS = TrainSettings(
    epochs=40,
    lr=1e-3,
    batch=2,
    dim=64,
    decays=(),
    query_window=4,
    tau=6,
    patience=100,
    validation_share=0.2,
    questions=16,
    save_every=7,
)
SHORT = replace(SETTINGS, epochs=4, validate_every=5, decays=(0.0, 0.9))
RECALL, MASS = "recall@0.135", "mass@0.135"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The toy's products are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    folder: Path = tmp_path_factory.mktemp("small")
    write_recordings(folder, Toy(documents=10, prompt_blocks=60, tokens=24))
    return TrainingData(folder)


def _trainer(data: TrainingData, state: Path, settings: TrainSettings = SHORT) -> Trainer:
    return Trainer(data, settings, state, Processes(), torch.device("cpu"), lambda _line: None)


def _stop_after(trainer: Trainer, step: int) -> None:
    """Let a run be killed before the step."""
    train = trainer._train

    def kill(*args: object) -> None:
        if trainer.step == step:
            raise KeyboardInterrupt
        train(*args)  # type: ignore[arg-type]

    trainer._train = kill  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def _assert_equal(one: TrainResult, other: TrainResult) -> None:
    for name, weight in one.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], weight, rtol=0, atol=0)
    assert [{**row, "loss": None} for row in one.history] == [{**row, "loss": None} for row in other.history]
    torch.testing.assert_close(
        [row["loss"] for row in one.history], [row["loss"] for row in other.history], rtol=0, atol=0, equal_nan=True
    )


def test_training_finds_needed_blocks(tmp_path: Path) -> None:
    write_recordings(tmp_path / "data", Toy(documents=20))
    data = TrainingData(tmp_path / "data")
    trainer = _trainer(data, tmp_path / "state.pt", SETTINGS)
    drawn = NeuralIndexer(make_spec(data, SETTINGS)).eval()
    drawn.init_weights(torch.Generator().manual_seed(0))
    untrained = Processes().mean(trainer.validation.run(drawn))
    baselines = trainer.validation.run_baselines(torch.device("cpu"), ["random", "bounds"])
    random = Processes().mean(baselines["random"])
    bounds = Processes().mean(baselines["bounds"])
    history = trainer.run().history
    best = max(history, key=lambda row: row[RECALL])
    assert history[-1]["loss"] < 0.5 * history[1]["loss"]
    # Block 0, which is forced, is half of what most questions need: recall starts at one half.
    for other in (random, untrained, bounds):
        assert best[RECALL] > other[RECALL] + 0.05
        assert best[MASS] > other[MASS] + 0.08
    assert best[RECALL] > history[0][RECALL] + 0.02


def test_equal_seeds_give_equal_weights(small: TrainingData, tmp_path: Path) -> None:
    first, second = (_trainer(small, tmp_path / f"{name}.pt").run() for name in "ab")
    _assert_equal(first, second)
    other = _trainer(small, tmp_path / "c.pt", replace(SHORT, seed=1)).run()
    assert not torch.equal(other.model.key_project, first.model.key_project)


@pytest.mark.parametrize("killed_before", [8, 14, 18])
def test_a_killed_run_goes_on_as_if_never_stopped(small: TrainingData, tmp_path: Path, killed_before: int) -> None:
    settings = replace(SHORT, epochs=6)
    whole = _trainer(small, tmp_path / "whole.pt", settings).run()
    assert whole.steps > killed_before
    killed = _trainer(small, tmp_path / "killed.pt", settings)
    _stop_after(killed, killed_before)
    resumed = _trainer(small, tmp_path / "killed.pt", settings)
    resumed.resume()
    assert resumed.step == killed_before // 7 * 7
    _assert_equal(resumed.run(), whole)
    finished = _trainer(small, tmp_path / "killed.pt", settings)
    finished.resume()
    _assert_equal(finished.run(), whole)


def test_a_full_disk_ends_a_run_that_can_go_on(small: TrainingData, tmp_path: Path) -> None:
    whole = _trainer(small, tmp_path / "whole.pt").run()
    state = tmp_path / "full.pt"
    _stop_after(_trainer(small, state), 9)
    kept = state.read_bytes()
    stopped, resumed = _trainer(small, state), _trainer(small, state)
    stopped.resume()
    with full_disk(len(kept) // 2), pytest.raises(StorageError, match=r"full.pt: cannot be written"):
        stopped.run()
    assert state.read_bytes() == kept
    assert not list(tmp_path.glob("*.partial"))
    resumed.resume()
    _assert_equal(resumed.run(), whole)


def test_other_settings_or_data_are_not_resumed(small: TrainingData, tmp_path: Path) -> None:
    _trainer(small, tmp_path / "state.pt", replace(SHORT, epochs=1)).run()
    with pytest.raises(ConfigError, match=r"was made with lr 0\.001, 0\.01 is given; allowed is the same"):
        _trainer(small, tmp_path / "state.pt", replace(SHORT, epochs=1, lr=0.01)).resume()
    write_recordings(tmp_path / "data", Toy(documents=11, prompt_blocks=60, tokens=24))
    with pytest.raises(ConfigError, match="was made with data"):
        _trainer(TrainingData(tmp_path / "data"), tmp_path / "state.pt", replace(SHORT, epochs=1)).resume()


def test_training_ends_when_recall_no_longer_rises(small: TrainingData, tmp_path: Path) -> None:
    result = _trainer(small, tmp_path / "state.pt", replace(SHORT, lr=1e-12, patience=2)).run()
    assert result.steps == 10
    assert len(result.history) == 3


def test_the_best_weights_are_kept_not_the_last(small: TrainingData, tmp_path: Path) -> None:
    trainer = _trainer(small, tmp_path / "state.pt", replace(SHORT, lr=0.003, tau=3, decays=()))
    train = trainer._train

    def break_late(*args: object) -> None:
        train(*args)  # type: ignore[arg-type]
        if trainer.step > 10:
            trainer.model.key_project.data.zero_()

    trainer._train = break_late  # type: ignore[method-assign, assignment]
    result = trainer.run()
    best = max(row[RECALL] for row in result.history)
    assert Processes().mean(trainer.validation.run(result.model.eval()))[RECALL] == best
    assert result.history[-1][RECALL] < best


def test_a_head_forecasts_from_what_was_paid(small: TrainingData, tmp_path: Path) -> None:
    trainer = _trainer(small, tmp_path / "state.pt", replace(SHORT, decays=(0.0, 0.9, 1.0)))
    model = trainer.run().model.eval()
    both = Processes().mean(trainer.validation.run(model))
    answers = trainer.validation.answers(model)
    content = Processes().mean(trainer.validation.judge(answers.content))
    # What the prompt's last tokens looked up is all that the answer needs
    assert both[RECALL] > content[RECALL] + 0.02
    assert both["lost@0.135"] < 0.5 * content["lost@0.135"]
    trainer.validation.calibrate(model, answers)
    assert model.head is not None
    assert model.head.calibration.tolist() != [1.0, 0.0]
    reached, kept = trainer.validation.threshold_share(model, answers)
    assert (reached, kept) == pytest.approx((0.04, 1.0), abs=0.03)


def test_calibration_makes_a_probability(small: TrainingData, tmp_path: Path) -> None:
    trainer = _trainer(small, tmp_path / "state.pt", replace(SHORT, decays=()))
    model = trainer.run().model.eval()
    validation: Validation = trainer.validation
    answers = validation.answers(model)
    validation.calibrate(model, answers)
    logits, shares = validation._candidates(answers.content)
    probabilities = model.probability(logits)
    # The maximum-likelihood offset makes the mean probability the mean share.
    assert float(probabilities.mean()) == pytest.approx(float(shares.mean()), abs=1e-3)
    # The threshold is where blocks above it have nearly all of what any are worth, or one half if that is lower
    assert 0 < model.spec.threshold <= 0.5
    worths = worth(shares)
    kept = float(worths[probabilities >= model.spec.threshold].sum() / worths.sum())
    assert kept >= 0.99
    assert validation.threshold_share(model, answers)[0] == float(
        (probabilities >= model.spec.threshold).float().mean()
    )


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    shares = [learning_rate_share(step, 1000) for step in range(1000)]
    assert shares[0] == pytest.approx(1 / 30)
    assert max(shares) == shares[30] == 1.0
    assert shares[-1] < 1e-4
    assert all(math.isfinite(learning_rate_share(step, 1)) for step in range(2))
