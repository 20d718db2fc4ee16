"""`flashmemory train`: a neural indexer from recorded attention, alone or in every process that torchrun starts."""

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from flashmemory_vllm.config import Aggregate
from flashmemory_vllm.errors import ConfigError

if TYPE_CHECKING:
    import torch

# Name, default, smallest value, help
_INTEGERS = (
    ("epochs", 4, 1, "passes over the documents"),
    ("batch", 4, 1, "documents of a step, of all processes together"),
    ("tokens", 8, 1, "tokens drawn from each document's answer, beside its question"),
    ("rank", 0, 0, "width of the bottleneck between queries and index heads; 0 is what --dim has for each query head"),
    ("heads", 0, 0, "index heads; 0 is one for each query head"),
    ("dim", 128, 1, "elements of a chunk's code; a chunk takes this many bytes and 4 for each anchor layer"),
    ("reach", 2, 0, "chunks at the end of a block that speak for the next one, too"),
    ("opening-steps", 2, 0, "decode steps that each end with a selection that is in force in the next one"),
    ("tau", 16, 1, "decode steps for which a selection is in force, as tau_steps in serving"),
    ("seed", 0, 0, "seed of weights, split, order and negatives"),
    ("validate-every", 0, 0, "steps between two validations; 0 is half an epoch"),
    ("patience", 6, 1, "validations without a better recall after which training ends"),
    ("questions", 32, 1, "validation tokens of a document, at most"),
    ("save-every", 500, 1, "steps between two saved states"),
)
_DECAYS = "0,0.7,0.9,0.98,0.99,1"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `train` command."""
    parser = subparsers.add_parser("train", help="train a neural indexer on what `capture` recorded")
    parser.add_argument("--data", type=Path, required=True, help="folder of a finished capture")
    parser.add_argument("--out", type=Path, required=True, help="file of the weights, .safetensors; card beside it")
    for name, default, _, text in _INTEGERS:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}. Default: {default}")
    parser.add_argument(
        "--memory-decays",
        dest="decays",
        type=_decays,
        default=_decays(_DECAYS),
        help="factors a token by which memories of attention fade that a forecast reads; '' for content alone. "
        f"Default: {_DECAYS}",
    )
    parser.add_argument(
        "--power",
        type=float,
        default=4.0,
        help="of its largest share that a block is worth in the loss: less, and what many heads pay a little to counts "
        "more, as is better with language models; more, and lookups do. Default: 4",
    )
    parser.add_argument("--lr", type=float, default=1.5e-4, help="peak learning rate. Default: 0.00015")
    parser.add_argument("--query-window", type=int, help="prompt tokens of a first selection. Default: as recorded")
    parser.add_argument("--delay", type=int, help="steps until a selection is in force. Default: as recorded")
    parser.add_argument(
        "--aggregate", choices=get_args(Aggregate), default="max", help="how layers are combined. Default: max"
    )
    parser.add_argument(
        "--validation-share", type=float, default=0.1, help="share of the documents that is kept back. Default: 0.1"
    )
    parser.add_argument("--device", help="torch device. Default: cuda if there is one, else cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the saved state if there is one")
    parser.add_argument("--commit", help="commit to name in the card, where git is not there to ask")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, calibrate, and write weights, card and curves."""
    from flashmemory_vllm.evaluation.provenance import Provenance
    from flashmemory_vllm.training.card import require_matplotlib
    from flashmemory_vllm.training.dataset import TrainingData
    from flashmemory_vllm.training.finish import finish
    from flashmemory_vllm.training.processes import Processes
    from flashmemory_vllm.training.settings import TrainSettings
    from flashmemory_vllm.training.trainer import Trainer

    _check(args)
    require_matplotlib()
    device = _device(args.device)
    data = TrainingData(args.data)
    if args.delay is None:
        args.delay = data.meta.delay
    args.query_window = _query_window(args.query_window, data.meta.query_window)
    settings = TrainSettings(**{field.name: getattr(args, field.name) for field in fields(TrainSettings)})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    state = args.out.with_suffix(".state.pt")
    processes = Processes.join(device)
    try:
        trainer = Trainer(data, settings, state, processes, device, _report)
        if args.resume and state.is_file():
            trainer.resume()
        result = trainer.run()
    finally:
        processes.leave()
    if processes.is_first:
        provenance = Provenance.collect(["flashmemory", *sys.argv[1:]], args.commit)
        for path in finish(result, trainer.validation, provenance, args.out):
            print(path)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.out.suffix != ".safetensors":
        raise ConfigError(f"--out is {args.out}: allowed is a file that ends in .safetensors")
    smallest = [(name, getattr(args, name.replace("-", "_")), least) for name, _, least, _ in _INTEGERS]
    if args.delay is not None:
        smallest.append(("delay", args.delay, 0))
    for name, given, least in smallest:
        if given < least:
            raise ConfigError(f"--{name} is {given}: allowed is {least} or more")
    if not args.power > 0:
        raise ConfigError(f"--power is {args.power}: allowed is a number above 0")
    if not args.lr > 0:
        raise ConfigError(f"--lr is {args.lr}: allowed is a number above 0")
    if not 0 < args.validation_share < 1:
        raise ConfigError(f"--validation-share is {args.validation_share}: allowed is a number between 0 and 1")


def _decays(given: str) -> tuple[float, ...]:
    """Raises `argparse.ArgumentTypeError` for what is no list of numbers in 0..1."""
    try:
        decays = tuple(map(float, given.split(","))) if given else ()
    except ValueError:
        decays = (-1.0,)
    if not all(0 <= decay <= 1 for decay in decays):
        raise argparse.ArgumentTypeError(f"{given!r}: allowed are numbers from 0 to 1, separated by commas, or nothing")
    return decays


def _query_window(given: int | None, recorded: int) -> int:
    if given is not None and not 1 <= given <= recorded:
        raise ConfigError(f"--query-window is {given}: allowed is 1 to {recorded}, as many as --data has")
    return given or recorded


def _device(given: str | None) -> "torch.device":
    """The device asked for; of several processes on CUDA each takes the one of its number."""
    import torch

    name = given or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device is {name!r}: allowed is a device of torch, such as cpu or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device is {name!r}: torch sees no CUDA device, allowed is cpu")
    local_rank = os.environ.get("LOCAL_RANK")
    return torch.device("cuda", int(local_rank)) if device.type == "cuda" and local_rank else device


def _report(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line)
