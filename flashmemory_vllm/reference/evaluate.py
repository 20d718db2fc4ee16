"""Dense accuracy of an exported reference model: the ceiling that every sparse figure is held against."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flashmemory_vllm.evaluation.tasks import TASK_NAMES, Sample, TaskName, iter_samples
from flashmemory_vllm.reference.model import ReferenceModel

DEFAULT_LENGTHS = (1024, 4096, 16384, 32768)
# Apart from every training seed, which are small numbers by habit.
EVALUATION_SEED = 20_260_609


@dataclass(frozen=True, slots=True)
class AccuracyCell:
    """Exact match of one task at one prompt length."""

    task: TaskName
    chat: bool
    num_tokens: int
    num_questions: int
    exact_match: float


@torch.inference_mode()
def count_right(model: ReferenceModel, samples: Sequence[Sample], device: str) -> int:
    """How many samples of one shape are answered right, word for word.

    The answer is fed in and each of its tokens must be the most likely one. That holds exactly when greedy
    generation spells the same answer, at the price of one forward pass.
    """
    tokens = np.stack([np.concatenate((sample.prompt_ids, sample.answer_ids)) for sample in samples])
    num_prompt, num_answer = len(samples[0].prompt_ids), len(samples[0].answer_ids)
    token_ids = torch.as_tensor(tokens, dtype=torch.int64, device=device)
    positions = torch.arange(num_prompt - 1, num_prompt + num_answer - 1, device=device)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    predicted = model(token_ids, positions, dtype).argmax(dim=-1)
    return int((predicted == token_ids[:, num_prompt:]).all(dim=1).sum())


def evaluate(
    folder: Path,
    device: str,
    report: Callable[[str], None],
    *,
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    num_questions: int = 200,
    seed: int = EVALUATION_SEED,
) -> list[AccuracyCell]:
    """Measure every task at every length, and `multikey` once more through the chat template.

    Args:
        folder: an exported checkpoint; its bf16 weights are what is measured.
        device: torch device; bf16 activations on CUDA, fp32 elsewhere.
        report: takes one line for each cell.
        lengths: tokens of the prompts. Default: 1K, 4K, 16K, 32K
        num_questions: questions of each cell, each over a context of its own. Default: 200
        seed: seed of the questions.

    Returns:
        One cell for each task and length.
    """
    model = ReferenceModel.load(folder, device)
    variants: list[tuple[TaskName, bool]] = [*((task, False) for task in TASK_NAMES), ("multikey", True)]
    cells = []
    for task, chat in variants:
        for num_tokens in lengths:
            chunks = iter_samples(task, num_tokens, num_questions, seed, chat=chat)
            num_right = sum(count_right(model, samples, device) for samples in chunks)
            cells.append(AccuracyCell(task, chat, num_tokens, num_questions, num_right / num_questions))
            report(f"{_label(cells[-1]):16s} {num_tokens:6d} tokens: {cells[-1].exact_match:.3f}")
    return cells


def _label(cell: AccuracyCell) -> str:
    return f"{cell.task} (chat)" if cell.chat else cell.task


def format_table(cells: Sequence[AccuracyCell]) -> str:
    """Markdown table of exact match, one row a task and one column a length."""
    lengths = sorted({cell.num_tokens for cell in cells})
    rows = ["| task | " + " | ".join(f"{n:,}" for n in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for label in dict.fromkeys(map(_label, cells)):
        by_len = {cell.num_tokens: cell.exact_match for cell in cells if _label(cell) == label}
        rows.append(f"| {label} | " + " | ".join(f"{by_len[n]:.3f}" for n in lengths) + " |")
    return "\n".join(rows)
