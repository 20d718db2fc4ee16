"""`flashmemory reference`: train, evaluate or locate the reference model."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.reference import reference_indexer_path, reference_model_path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `reference` command and its own commands."""
    parser = subparsers.add_parser("reference", help="train, evaluate or locate the reference model")
    _add_commands(parser)


def _add_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="reference_command", required=True)
    train = commands.add_parser("train", help="train, export and evaluate a model")
    train.add_argument("--out", type=Path, required=True, help="folder for weights, tokenizer, card and log")
    train.add_argument("--checkpoint", type=Path, help="training state. Default: OUT/checkpoint.pt")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint if there is one")
    train.add_argument("--seed", type=int, default=0, help="seed of weights and data. Default: 0")
    train.add_argument("--max-minutes", type=float, default=8.0, help="wall-clock of training. Default: 8")
    train.add_argument("--max-steps", type=int, default=0, help="steps at most; 0 leaves only the clock. Default: 0")
    train.add_argument("--max-tokens", type=int, default=32768, help="longest context. Default: 32768")
    train.add_argument("--tokens-per-step", type=int, default=65536, help="tokens of a batch. Default: 65536")
    train.add_argument("--lr", type=float, default=1e-3, help="peak learning rate. Default: 0.001")
    train.add_argument("--log-every", type=int, default=50, help="steps between log lines. Default: 50")
    train.add_argument("--compile", action="store_true", help="torch.compile the layers")
    train.add_argument("--num-layers", type=int, default=6, help="decoder layers. Default: 6")
    train.set_defaults(run=run_train)
    evaluate = commands.add_parser("evaluate", help="dense accuracy for each task and length")
    evaluate.add_argument("--model", type=Path, default=reference_model_path(), help="Default: the shipped model")
    evaluate.set_defaults(run=run_evaluate)
    for command in (train, evaluate):
        command.add_argument("--device", default="cuda", help="torch device. Default: cuda")
        command.add_argument("--questions", type=int, default=200, help="questions of each cell. Default: 200")
        command.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 32768], help="prompt tokens")
    for name, text, folder in (
        ("path", "print the folder of the shipped model", reference_model_path()),
        ("indexer", "print the folder of the indexer trained for it", reference_indexer_path()),
    ):
        commands.add_parser(name, help=text).set_defaults(run=run_path, folder=folder)


def run_train(args: argparse.Namespace) -> int:
    """Train, export, evaluate and write the card; all into `--out`."""
    from flashmemory_vllm.reference.evaluate import evaluate
    from flashmemory_vllm.reference.export import export_model, write_card
    from flashmemory_vllm.reference.model import ReferenceConfig
    from flashmemory_vllm.reference.train import Trainer, TrainSettings

    _check_max_tokens(args.max_tokens)
    settings = TrainSettings(**{field.name: getattr(args, field.name) for field in fields(TrainSettings)})
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.checkpoint or args.out / "checkpoint.pt"
    config = ReferenceConfig(num_hidden_layers=args.num_layers)
    trainer = Trainer(settings, config, checkpoint, args.out / "train_log.jsonl", _report)
    if args.resume and checkpoint.exists():
        trainer.resume()
    result = trainer.run()
    export_model(result.model, args.out)
    cells = evaluate(args.out, args.device, _report, lengths=args.lengths, num_questions=args.questions)
    write_card(args.out, settings, result, cells)
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    """Print dense accuracy of an exported model."""
    from flashmemory_vllm.reference.evaluate import evaluate, format_table

    cells = evaluate(args.model, args.device, _report, lengths=args.lengths, num_questions=args.questions)
    print(format_table(cells))
    return 0


def run_path(args: argparse.Namespace) -> int:
    """Print where the shipped model or its indexer lies."""
    print(args.folder)
    return 0


def _report(line: str) -> None:
    print(line, flush=True)


def _check_max_tokens(max_tokens: int) -> None:
    if max_tokens < 128 or max_tokens & (max_tokens - 1):
        raise ConfigError(f"--max-tokens is {max_tokens}, it must be a power of two from 128 up")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on its own, without the rest of the command line."""
    parser = argparse.ArgumentParser(prog="flashmemory reference", description=__doc__)
    _add_commands(parser)
    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
