"""What `flashmemory eval` is to measure: its command line as parts."""

import argparse
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashmemory_vllm.capture.encoder import load_encoder
from flashmemory_vllm.capture.prompts import Encoder
from flashmemory_vllm.capture.reference_prompts import speaks_reference_language
from flashmemory_vllm.capture.text_questions import TextQuestions
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.eval_rows import SUITES, SuiteName
from flashmemory_vllm.evaluation.eval_run import Part
from flashmemory_vllm.evaluation.longbench import LongBenchOptions
from flashmemory_vllm.evaluation.loss import LossPart
from flashmemory_vllm.evaluation.needles import NeedlePart, Questions, ReferenceQuestions
from flashmemory_vllm.evaluation.parity import PARITY_FOLDER, ParityPart
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.evaluation.ruler import DOWNLOADS, MIN_TOKENS, OFFLINE_TASKS, RulerOptions, check_harness
from flashmemory_vllm.evaluation.standard_parts import LongBenchPart, RulerPart
from flashmemory_vllm.evaluation.texts import fingerprint, read_texts, windows

# The first forced token is dense on both sides
MIN_FORCED_TOKENS = 2
LENGTHS = {"reference": (4096, 8192, 16384), "english": (16384, 32768)}
_COUNTS = (
    *("depths", "questions", "parity_prompts", "parity_tokens", "documents", "limit", "longbench_tokens"),
    "concurrency",
)


def make_parts(args: argparse.Namespace, model: str, provenance: Provenance) -> list[Part]:
    """Parts in the order in which they are measured.

    Args:
        args: the command line.
        model: folder or Hugging Face id.
        provenance: where the rows come from.

    Raises:
        ConfigError: an option is out of range, or the tokenizer cannot be loaded.
    """
    suites = read_suites(args)
    for name in _COUNTS:
        number = getattr(args, name)
        if number is not None and number < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {number}: allowed is 1 or more")
    if args.seed < 0:
        raise ConfigError(f"--seed is {args.seed}: allowed is 0 or more")
    tokenizer = args.tokenizer or model
    encoder, _ = load_encoder(tokenizer)
    questions: Questions = ReferenceQuestions() if speaks_reference_language(encoder.text) else TextQuestions(encoder)
    lengths = _read_lengths(args.lengths) or LENGTHS[questions.language]
    job = _Job(args, tokenizer, encoder, questions, lengths, provenance)
    make: dict[SuiteName, Callable[[], Iterator[Part]]] = {
        "parity": job.parity,
        "loss": job.loss,
        "needles": job.needles,
        "ruler": job.ruler,
        "longbench": job.longbench,
    }
    return [part for suite in suites for part in make[suite]()]


def read_suites(args: argparse.Namespace) -> list[SuiteName]:
    """Suites of `--suites`, each once.

    Raises:
        ConfigError: one is unknown, or lacks what it needs.
    """
    known: dict[str, SuiteName] = {name: name for name in SUITES}
    names = [name.strip() for name in args.suites.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"--suites has {', '.join(map(repr, unknown))}: allowed is {', '.join(known)}")
    if ("longbench" in names) != (args.longbench is not None):
        raise ConfigError(
            f"--longbench is {args.longbench} and --suites is {args.suites!r}: allowed is a file with the suite "
            "longbench, and with no other"
        )
    if ("loss" in names) != bool(args.texts):
        given = "not given" if args.texts is None else " ".join(map(str, args.texts))
        raise ConfigError(
            f"--texts is {given} and --suites is {args.suites!r}: allowed are files with the suite loss, and no other"
        )
    if args.longbench is not None and not args.longbench.is_file():
        raise ConfigError(
            f"--longbench is {args.longbench}: there is no such file, allowed is one in the format of "
            "THUDM/LongBench-v2"
        )
    return [known[name] for name in dict.fromkeys(names)]


def read_ruler_tasks(text: str | None) -> list[str]:
    """Tasks of `--ruler-tasks`, each once.

    Raises:
        ConfigError: one is unknown.
    """
    if text is None:
        return list(OFFLINE_TASKS)
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in {*OFFLINE_TASKS, *DOWNLOADS}]:
        raise ConfigError(
            f"--ruler-tasks has {', '.join(map(repr, unknown))}: allowed without a download are "
            f"{', '.join(OFFLINE_TASKS)}, with one {', '.join(DOWNLOADS)}"
        )
    return list(dict.fromkeys(names))


def depths_of(count: int) -> list[float]:
    """Shares from 0 to 1, evenly; one alone is in the middle."""
    return [0.5] if count == 1 else [round(index / (count - 1), 4) for index in range(count)]


@dataclass(frozen=True, slots=True)
class _Job:
    """The command line with what it was read to."""

    args: argparse.Namespace
    tokenizer: str
    encoder: Encoder
    questions: Questions
    lengths: Sequence[int]
    provenance: Provenance

    def parity(self) -> Iterator[Part]:
        args = self.args
        names = {"prompts": args.parity_prompts, "max_tokens": args.parity_tokens, "seed": args.seed}
        for tokens in self.lengths:
            part = ParityPart(
                tokens, args.parity_tokens, args.parity_prompts, args.seed, self.questions, args.out / PARITY_FOLDER
            )
            yield Part("parity", f"parity {tokens}", part, {"language": self.questions.language, **names})

    def loss(self) -> Iterator[Part]:
        args = self.args
        if args.loss_tokens < MIN_FORCED_TOKENS:
            raise ConfigError(f"--loss-tokens is {args.loss_tokens}: allowed is {MIN_FORCED_TOKENS} or more")
        texts = read_texts(args.texts)
        names = {"texts_sha256": fingerprint(texts), "documents": args.documents, "forced_tokens": args.loss_tokens}
        for tokens in self.lengths:
            documents = windows(texts, self.encoder.text, tokens + args.loss_tokens, args.documents)
            yield Part("loss", f"loss {tokens}", LossPart(tokens, documents, args.concurrency), names)

    def needles(self) -> Iterator[Part]:
        args = self.args
        names = {"questions": args.questions, "depths": args.depths, "seed": args.seed}
        for tokens in self.lengths:
            part = NeedlePart(
                tokens, depths_of(args.depths), args.questions, args.seed, self.questions, args.concurrency
            )
            yield Part("needles", f"needles {tokens}", part, {"language": self.questions.language, **names})

    def ruler(self) -> Iterator[Part]:
        args = self.args
        check_harness()
        if self.lengths[0] < MIN_TOKENS:
            raise ConfigError(f"--lengths has {self.lengths[0]}: allowed with the suite ruler are {MIN_TOKENS} or more")
        options = RulerOptions(self.encoder.knows_chats, args.concurrency, provenance=self.provenance)
        settings = {"limit": args.limit, "chat_template": options.chat_template}
        for tokens in self.lengths:
            for task in read_ruler_tasks(args.ruler_tasks):
                part = RulerPart(task, tokens, self.tokenizer, args.limit, args.out / "ruler", options)
                yield Part("ruler", f"{task} {tokens}", part, settings)

    def longbench(self) -> Iterator[Part]:
        args = self.args
        options = LongBenchOptions(
            self.encoder.knows_chats, limit=args.limit, num_concurrent=args.concurrency, provenance=self.provenance
        )
        path: Path = args.longbench
        part = LongBenchPart(path, self.tokenizer, args.longbench_tokens, args.out / "longbench", options)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        settings = {"file_sha256": digest, "limit": args.limit, "max_tokens": args.longbench_tokens}
        yield Part("longbench", "longbench", part, settings)


def _read_lengths(text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        lengths = sorted({int(number) for number in text.split(",")})
    except ValueError:
        lengths = []
    if not lengths or lengths[0] < 1:
        raise ConfigError(f"--lengths is {text!r}: allowed are integers from 1 up, separated by commas")
    return lengths
