"""Training lowers the loss, goes on where it stopped, and climbs its lengths by accuracy and clock."""

import json
from pathlib import Path

import pytest
import torch

from flashmemory_vllm.cli.reference import main
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.tasks import TASK_NAMES, TaskName
from flashmemory_vllm.reference.curriculum import Curriculum
from flashmemory_vllm.reference.data import AnswerSpan, BatchPlan, TrainingBatch, build_batch
from flashmemory_vllm.reference.model import ReferenceConfig
from flashmemory_vllm.reference.train import Trainer, TrainSettings, exact_match

TINY = ReferenceConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=16)


def _trainer(folder: Path, max_steps: int) -> Trainer:
    settings = TrainSettings(
        max_tokens=128,
        tokens_per_step=1024,
        lr=1e-2,
        device="cpu",
        log_every=10,
        max_steps=max_steps,
        max_minutes=60,
    )
    return Trainer(settings, TINY, folder / "checkpoint.pt", folder / "log.jsonl", lambda _line: None)


def _all_right(curriculum: Curriculum, clock_share: float = 0.0) -> bool:
    perfect: dict[TaskName, float] = dict.fromkeys(TASK_NAMES, 1.0)
    return curriculum.observe(curriculum.num_tokens, perfect, clock_share)


def test_a_short_run_lowers_the_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _trainer(tmp_path, max_steps=120).run()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # Even without retrieval it learns which kind of word comes when: from ln 2048 = 7.6 to 3/4 ln 512 = 4.7.
    assert losses[0] > 7.0
    assert losses[-1] < 5.5


def test_resuming_goes_on_with_the_same_state(tmp_path: Path) -> None:
    first = _trainer(tmp_path, max_steps=5)
    first.run()
    second = _trainer(tmp_path, max_steps=8)
    second.resume()
    assert second.step == 5
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, rtol=0, atol=0)
    assert second.run().num_steps == 8


def test_exact_match_wants_every_word() -> None:
    labels = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])
    predicted = torch.tensor([[1, 2, 3, 4, 5], [1, 9, 3, 4, 5]])
    batch = build_batch(BatchPlan(2, 128, (("multikey", 1.0),)), 0, 0)
    spans = (AnswerSpan("multikey", 0, 2), AnswerSpan("tracking", 2, 5))
    two = TrainingBatch(batch.plan, batch.tokens, batch.positions, batch.labels, batch.weights, spans)
    assert exact_match(predicted, labels, two).tolist() == [0.5, 1.0]


def test_accuracy_doubles_the_length() -> None:
    curriculum = Curriculum(max_tokens=512, tokens_per_step=4096, seed=0)
    while not _all_right(curriculum):
        assert curriculum.steps < 100
    assert curriculum.num_tokens == 256
    assert {curriculum.plan(step).num_tokens for step in range(50)} == {64, 128, 256}
    while curriculum.num_tokens < 512:
        _all_right(curriculum)
    assert not any(_all_right(curriculum) for _ in range(100))


def test_the_clock_forces_lengths_but_never_the_first() -> None:
    curriculum = Curriculum(max_tokens=512, tokens_per_step=4096, seed=0)
    assert not any(curriculum.observe(128, {"multikey": 0.0}, 0.99) for _ in range(400))
    curriculum.num_tokens = 256
    assert any(curriculum.observe(256, {"multikey": 0.0}, 0.99) for _ in range(400))
    assert curriculum.num_tokens == 512


def test_lagging_tasks_come_up_more_often() -> None:
    curriculum = Curriculum(max_tokens=512, tokens_per_step=4096, seed=0)
    curriculum.observe(128, {"multivalue": 0.1, "multiquery": 1.0}, 0.0)
    weights = dict(curriculum.plan(0).task_weights)
    assert weights["multivalue"] > 2 * weights["multiquery"]


def test_the_command_writes_a_whole_checkpoint(tmp_path: Path) -> None:
    args = ["train", "--out", str(tmp_path), "--device", "cpu", "--num-layers", "1", "--max-tokens", "128"]
    assert main([*args, "--tokens-per-step", "512", "--max-steps", "3", "--questions", "2", "--lengths", "1024"]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "README.md", "evaluation.json"}
    assert "| multikey (chat) |" in (tmp_path / "README.md").read_text()


def test_lengths_are_powers_of_two(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="power of two"):
        main(["train", "--out", str(tmp_path), "--max-tokens", "1000"])
