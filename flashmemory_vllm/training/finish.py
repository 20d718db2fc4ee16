"""What follows training: calibration, the checkpoint, and the report beside it."""

from __future__ import annotations

from pathlib import Path

from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.indexer.checkpoint import round_weights, save_indexer
from flashmemory_vllm.training.card import TrainingReport, write_report
from flashmemory_vllm.training.processes import Processes
from flashmemory_vllm.training.trainer import TrainResult
from flashmemory_vllm.training.validation import Validation


def finish(result: TrainResult, validation: Validation, provenance: Provenance, out: Path) -> list[Path]:
    """Calibrate the model, compare it with selectors that need no training, and write all files.

    Args:
        result: of the training; its model is calibrated.
        validation: the documents kept back.
        provenance: what the card names.
        out: file of the weights.

    Returns:
        Every file written.

    Raises:
        ConfigError: the documents kept back are too short to calibrate on.
    """
    alone = Processes()
    model = result.model.eval()
    round_weights(model)
    # Its documents are read once: calibration changes no logit
    answers = validation.answers(model)
    validation.calibrate(model, answers)
    save_indexer(model, out)
    scores = {"neural": alone.mean(validation.judge(answers.whole))}
    if model.head is not None:
        scores["held"] = alone.mean(validation.run_held(model, answers))
        scores["content"] = alone.mean(validation.judge(answers.content))
    baselines = validation.run_baselines(model.bias.device)
    scores |= {name: alone.mean(columns) for name, columns in baselines.items()}
    report = TrainingReport(
        spec=model.spec,
        provenance=provenance,
        parameters=sum(weight.numel() for weight in model.parameters()),
        documents=(result.train_documents, validation.num_documents),
        questions=len(validation),
        steps=result.steps,
        minutes=result.minutes,
        history=result.history,
        scores=scores,
        reached=validation.threshold_share(model, answers),
    )
    return [out, *write_report(report, out)]
