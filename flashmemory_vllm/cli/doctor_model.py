"""What the doctor says of a model: which of its layers are managed, and what the others take of the device."""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flashmemory_vllm.doctor.finding import GIB, Finding
from flashmemory_vllm.errors import ConfigError

if TYPE_CHECKING:
    from flashmemory_vllm.runtime.forecast import ModelSizes

KIB = 1 << 10
# Of what windows and states take for requests that run: with more than this for tokens under way, smaller steps help
MOST_IN_FLIGHT = 0.5
SMALL_BYTES = GIB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which model, served how."""
    parser.add_argument("--model", help="folder or Hugging Face id: look at its configuration, too")
    parser.add_argument(
        "--context", type=int, default=131072, help="tokens of its longest request. Default: %(default)s"
    )
    parser.add_argument("--max-num-seqs", type=int, default=256, help="its requests at once. Default: %(default)s")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=8192, help="tokens of its steps. Default: %(default)s"
    )
    parser.add_argument("--block-size", type=int, default=16, help="tokens of its blocks. Default: %(default)s")


def model_findings(args: argparse.Namespace) -> Iterator[Finding]:
    """Whether a model is one that the server takes, and what its layers with windows or states take of one GPU.

    Raises:
        ConfigError: a number means nothing.
    """
    from flashmemory_vllm.cli.plan import model_sizes, read_model_fields
    from flashmemory_vllm.cli.plan_layers import layer_kinds
    from flashmemory_vllm.doctor.device import device_count

    for name in ("context", "max_num_seqs", "max_num_batched_tokens", "block_size"):
        if (given := getattr(args, name)) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {given}: allowed is 1 or more")
    try:
        fields = read_model_fields(args.model)
        model = model_sizes(fields, "auto", kinds=layer_kinds(fields, args.context))
    except ConfigError as error:
        yield Finding("model", "fail", str(error), "serve it with vLLM's own attention backend")
        return
    yield _layers(model)
    if model.is_latent and device_count():
        remedy = "serve it on a CPU, or with vLLM's own attention backend"
        yield Finding("latent attention", "fail", "not served on a GPU yet: a server refuses to start", remedy)
    if model.num_window_layers or model.num_state_layers:
        yield _native_blocks(model, args)


def _layers(model: "ModelSizes") -> Finding:
    attention = "latent attention (on a CPU only)" if model.is_latent else "full attention"
    managed = f"{model.num_layers} layers of {attention}, {model.shape(1).block_bytes / KIB:g} KiB for a token"
    beside = []
    if model.num_window_layers:
        beside.append(f"{model.num_window_layers} with a window of {model.window:,} tokens")
    if model.num_state_layers:
        beside.append(f"{model.num_state_layers} with a state")
    others = f"; {' and '.join(beside)} stay on the device" if beside else ", and no others"
    return Finding("model", "ok", f"{managed}, are managed{others}")


def _native_blocks(model: "ModelSizes", args: argparse.Namespace) -> Finding:
    from flashmemory_vllm.runtime.forecast import CONCURRENT_STEPS
    from flashmemory_vllm.runtime.native import native_pool

    in_flight = CONCURRENT_STEPS * args.max_num_batched_tokens
    pool = native_pool(model.native_kinds(args.block_size, 1), model.num_layers, in_flight, args.context)
    prefill = (pool.request_blocks - pool.decode_blocks) * pool.block_bytes
    running = (1 + args.max_num_seqs * pool.decode_blocks) * pool.block_bytes + prefill
    found = (
        f"{running / GIB:.2f} GiB of one GPU's KV memory for {args.max_num_seqs:,} requests, {prefill / GIB:.2f} of it "
        f"for a prompt in steps of {args.max_num_batched_tokens:,} tokens"
    )
    if prefill > max(SMALL_BYTES, MOST_IN_FLIGHT * running):
        return Finding("windows and states", "warn", found, "lower --max-num-batched-tokens: most is for the steps")
    remedy = "flashmemory plan tells how many requests and prefixes fit beside the weights"
    return Finding("windows and states", "ok", found, remedy)
