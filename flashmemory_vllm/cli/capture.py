"""`flashmemory capture`: record what dense attention looks at, to train an indexer on and to know the best set."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmemory_vllm.cli.block_size import add_block_size, block_size_of
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.processes.guarded import GuardedProcess
from flashmemory_vllm.reference import reference_model_path

if TYPE_CHECKING:
    from flashmemory_vllm.capture.prompts import Prompt
    from flashmemory_vllm.capture.writer import CaptureMeta, ModelShape

GIB = 1 << 30
# Documents from which anchor layers are chosen
FIRST_LOOK = 8
WORKER_MODULE = "flashmemory_vllm.cli.capture_worker"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `capture` command."""
    parser = subparsers.add_parser("capture", help="record what a model's dense attention looks at")
    parser.add_argument("--out", type=Path, required=True, help="folder of the recording; one that was begun goes on")
    parser.add_argument(
        "--model", default=str(reference_model_path()), help="folder or Hugging Face id. Default: the shipped model"
    )
    parser.add_argument("--prompts", type=Path, help="JSON lines. Default: generated documents with questions")
    parser.add_argument(
        "--texts", type=Path, nargs="+", help="text files or JSON lines to record along, in place of answers"
    )
    parser.add_argument(
        "--accuracy-questions", type=int, help="ask what `flashmemory accuracy` asks at --tokens: so many of each task"
    )
    parser.add_argument(
        "--documents", type=int, default=200, help="documents to generate, or windows of --texts. Default: 200"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the longest one. Default: 8192")
    parser.add_argument("--max-output-tokens", type=int, default=512, help="most tokens of an answer. Default: 512")
    parser.add_argument(
        "--anchor-layers",
        type=int,
        nargs="+",
        help="layers of full attention to keep queries and keys of, by their index among all layers of the model. "
        "Default: three, by a first look",
    )
    parser.add_argument(
        "--chunk-size", type=int, default=4, help="tokens that keys are pooled over; divides the block size. Default: 4"
    )
    parser.add_argument(
        "--query-window", type=int, default=16, help="newest prompt tokens to keep the queries of. Default: 16"
    )
    parser.add_argument("--every", type=int, default=1, help="output tokens between two recorded. Default: 1")
    parser.add_argument("--window", type=int, default=16, help="steps that a selection is to serve. Default: 16")
    parser.add_argument("--delay", type=int, default=1, help="steps that a selection comes late. Default: 1")
    parser.add_argument("--layer-mass", action="store_true", help="keep each layer's mass; what the oracle reads")
    parser.add_argument("--max-gib", type=float, default=64.0, help="GiB that the folder may take. Default: 64")
    parser.add_argument("--seed", type=int, default=0, help="seed of generated documents. Default: 0")
    parser.add_argument("--batch", type=int, default=16, help="requests that run at once. Default: 16")
    add_block_size(parser)
    parser.add_argument("--dtype", default="auto", help="dtype of the model. Default: auto")
    parser.add_argument("--gpu-memory-bytes", type=int, help="device memory for KV. Default: vLLM's share")
    parser.add_argument("--host-memory-gib", type=float, help="GiB of host memory for KV. Default: half")
    parser.add_argument("--commit", help="commit to name, where git is not there to ask")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Record what the folder lacks, in a process that can be ended even while its engine hears nothing."""
    from flashmemory_vllm.capture.writer import is_complete

    check(args)
    if is_complete(args.out):
        check_complete(args)
        print(f"{args.out} is complete")
        return 0
    with GuardedProcess([sys.executable, "-m", WORKER_MODULE, *args.words]) as process:
        return process.wait()


def check_complete(args: argparse.Namespace) -> None:
    """See that what a complete folder holds is what is asked for.

    Raises:
        ConfigError: it is another capture.
    """
    from flashmemory_vllm.capture.writer import differences, recorded_shape

    model_type, shape = recorded_shape(args.out)
    anchors = shape.anchor_layers if args.anchor_layers is None else shape.places(args.anchor_layers)
    asked = replace(shape, block_size=block_size_of(args), anchor_layers=anchors)
    prompts, _ = make_prompts(args)
    if differing := differences(args.out, _meta(args, asked, model_type, prompts, {})):
        raise ConfigError(
            f"--out: {args.out} holds another capture, which differs in {', '.join(differing)}; allowed is another "
            "folder, or what it was recorded with"
        )


def run_here(args: argparse.Namespace) -> int:
    """Record with an engine inside this process."""
    from flashmemory_vllm.capture.anchors import choose_anchors
    from flashmemory_vllm.capture.recorder import Choices
    from flashmemory_vllm.capture.run import look, record
    from flashmemory_vllm.capture.writer import CaptureWriter, begun_anchors
    from flashmemory_vllm.plugin.capture import CaptureEngine

    anchors = None if args.anchor_layers is None else tuple(args.anchor_layers)
    prompts, stop_token_ids = make_prompts(args)
    longest = max(prompt.max_tokens for prompt in prompts)
    arguments = engine_arguments(args, prompts)
    engine = CaptureEngine(args.model, arguments, anchors, longest, stop_token_ids, args.host_memory_gib)
    with closing(engine):
        choices = Choices(**{field.name: getattr(args, field.name) for field in fields(Choices)})
        # Those asked for the engine has already
        chosen = None if anchors else begun_anchors(args.out)
        if chosen is None and not anchors:
            shape = engine.record(replace(choices, layer_mass=True))
            chosen = choose_anchors(look(engine, first_look(prompts)), shape.block_size)
        shape = engine.record(choices, chosen)
        meta = make_meta(args, shape, engine.model_type, prompts)
        writer = CaptureWriter(args.out, meta, int(args.max_gib * GIB))
        record(engine, prompts, writer, args.every, args.batch)
    print(f"{writer.num_documents} documents in {args.out}")
    return 0


def first_look(prompts: "Sequence[Prompt]") -> "list[Prompt]":
    """Some longer prompts, the first ones: of all kinds, where kinds take turns.

    Args:
        prompts: at least one.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    return [prompt for prompt in prompts if len(prompt.ids) > longest // 2][:FIRST_LOOK]


def check(args: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing.

    Raises:
        ConfigError: names the option.
    """
    for option in (
        "documents",
        "accuracy_questions",
        "tokens",
        "max_output_tokens",
        "chunk_size",
        "query_window",
        "every",
        "window",
        "batch",
    ):
        given = getattr(args, option)
        if given is not None and given < 1:
            raise ConfigError(f"--{option.replace('_', '-')} is {given}: allowed is 1 or more")
    sources = [option for option in ("prompts", "texts", "accuracy_questions") if getattr(args, option) is not None]
    if len(sources) > 1:
        given, other = (f"--{option.replace('_', '-')}" for option in (sources[-1], sources[0]))
        raise ConfigError(f"{given}: given with {other}; allowed is one of them")
    if block_size_of(args) % args.chunk_size:
        raise ConfigError(
            f"--chunk-size is {args.chunk_size}: allowed is what divides {block_size_of(args)}, the block size"
        )
    if args.delay < 0:
        raise ConfigError(f"--delay is {args.delay}: allowed is 0 or more")
    if not args.max_gib > 0:
        raise ConfigError(f"--max-gib is {args.max_gib}: allowed is above 0")


def make_prompts(args: argparse.Namespace) -> "tuple[list[Prompt], tuple[int, ...]]":
    """What to ask, and the tokens that end an answer.

    The reference model is asked in its own language; any other by generated text, unless there is a file.

    Raises:
        ConfigError: the file holds something else, or a prompt does not fill one block.
    """
    from flashmemory_vllm.capture.encoder import load_encoder
    from flashmemory_vllm.capture.given_texts import given_prompts
    from flashmemory_vllm.capture.prompts import read_prompts
    from flashmemory_vllm.capture.reference_prompts import (
        accuracy_prompts,
        reference_prompts,
        speaks_reference_language,
    )
    from flashmemory_vllm.capture.text_prompts import text_prompts
    from flashmemory_vllm.evaluation.texts import read_texts

    encoder, stop_token_ids = load_encoder(args.model)
    if args.prompts is not None:
        prompts = read_prompts(args.prompts, encoder, args.max_output_tokens)
    elif args.texts is not None:
        texts = read_texts(args.texts)
        prompts = given_prompts(texts, encoder, args.documents, args.tokens, args.max_output_tokens)
    elif args.accuracy_questions is not None:
        prompts = accuracy_prompts(args.accuracy_questions, args.tokens)
    elif speaks_reference_language(encoder.text):
        prompts = reference_prompts(args.documents, args.tokens, args.seed, args.max_output_tokens)
    else:
        prompts = text_prompts(encoder, args.documents, args.tokens, args.max_output_tokens, args.seed)
    shortest, block_size = min(len(prompt.ids) for prompt in prompts), block_size_of(args)
    if shortest < block_size:
        raise ConfigError(
            f"a prompt has {shortest} tokens: allowed is --block-size ({block_size}) or more, to have a block"
        )
    return prompts, stop_token_ids


def make_meta(
    args: argparse.Namespace, shape: "ModelShape", model_type: str, prompts: "Sequence[Prompt]"
) -> "CaptureMeta":
    """What `meta.json` is to say."""
    from flashmemory_vllm.evaluation.provenance import Provenance

    provenance = Provenance.collect(["flashmemory", *sys.argv[1:]], args.commit)
    return _meta(args, shape, model_type, prompts, asdict(provenance))


def _meta(
    args: argparse.Namespace,
    shape: "ModelShape",
    model_type: str,
    prompts: "Sequence[Prompt]",
    provenance: "Mapping[str, Any]",
) -> "CaptureMeta":
    from flashmemory_vllm.capture.prompts import digest_of_all
    from flashmemory_vllm.capture.writer import CaptureMeta

    recorded = {
        "prompts": digest_of_all(prompts),
        "seed": args.seed if args.prompts is None else None,
        "every": args.every,
        "layer_mass": args.layer_mass,
    }
    return CaptureMeta(
        model=Path(args.model).name if Path(args.model).is_dir() else args.model,
        model_type=model_type,
        shape=shape,
        chunk_size=args.chunk_size,
        query_window=args.query_window,
        window=args.window,
        delay=args.delay,
        provenance={**provenance, **recorded},
    )


def engine_arguments(args: argparse.Namespace, prompts: "Sequence[Prompt]") -> dict[str, object]:
    """Arguments of `vllm.LLM`: room for the longest prompt with its answer, and no more."""
    arguments: dict[str, object] = {
        "max_model_len": max(len(prompt.ids) + prompt.max_tokens for prompt in prompts),
        "max_num_seqs": args.batch,
        "block_size": block_size_of(args),
        "dtype": args.dtype,
    }
    if args.gpu_memory_bytes is not None:
        arguments["kv_cache_memory_bytes"] = args.gpu_memory_bytes
        # vLLM refuses to start when less than this share of the device is free, though the size is given.
        arguments["gpu_memory_utilization"] = 0.1
    return arguments
