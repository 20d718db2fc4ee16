"""`flashmemory plan`: what a server would size and how many long requests it would decode, before there is one."""

import argparse
import json
import shlex
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from flashmemory_vllm.config import SECTION, FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError

if TYPE_CHECKING:
    from flashmemory_vllm.runtime.forecast import Forecast, ModelSizes

GIB = 1 << 30
# A model to plan with where none is at hand; its other sizes are those of Llama 3.1 8B.
LLAMA_8B: dict[str, Any] = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SHAPES = {"llama-8b": LLAMA_8B}
# Fields of configurations whose weights are not those of a plain dense decoder
NOT_PLAIN = ("num_experts", "num_local_experts", "n_routed_experts", "quantization_config")


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Where the bytes for KV come from.

    Attributes:
        kv_bytes: what slots, index keys and staging may take.
        weights_bytes: what the weights take, or None if the bytes for KV were given.
        is_estimate: whether the weights were estimated from the model's configuration.
    """

    kv_bytes: int
    weights_bytes: int | None
    is_estimate: bool


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `plan` command."""
    parser = subparsers.add_parser("plan", help="what a server of one GPU would size, and how many requests fit")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="folder or Hugging Face id of a model; only its configuration is read")
    model.add_argument("--shape", choices=tuple(SHAPES), help="sizes of a well-known model, without reading one")
    device = parser.add_mutually_exclusive_group(required=True)
    device.add_argument("--gpu-memory-gib", type=float, help="GiB of the GPU, of which the weights are subtracted")
    device.add_argument("--kv-cache-memory-bytes", type=int, help="device bytes for KV, as vLLM's option of that name")
    parser.add_argument("--weights-gib", type=float, help="GiB of the weights. Default: estimated")
    parser.add_argument("--host-memory-gib", type=float, help=f"GiB of host memory: {SECTION}.host_memory_gib")
    parser.add_argument("--context", type=int, required=True, help="tokens of a request: --max-model-len")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="requests at once. Default: %(default)s")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=8192, help="tokens of a step. Default: %(default)s"
    )
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a block. Default: %(default)s")
    parser.add_argument(
        "--kv-dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="dtype of model and KV. Default: the model's",
    )
    parser.add_argument("--options", default="{}", help=f"JSON object: the section {SECTION} of --additional-config")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from flashmemory_vllm.runtime.forecast import ServerSizes, forecast

    _check_ranges(args)
    options = read_options(args)
    config = FlashMemoryConfig.from_additional_config({SECTION: options})
    fields = SHAPES[args.shape] if args.shape else read_model_fields(args.model)
    model = model_sizes(fields, args.kv_dtype)
    memory = device_memory(args, fields, model)
    server = ServerSizes(
        device_bytes=memory.kv_bytes,
        context_tokens=args.context,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        block_size=args.block_size,
    )
    made = forecast(model, config, server)
    command = serve_command(args, options)
    print(json.dumps(as_json(memory, made, command), indent=2) if args.json else as_table(args, memory, made, command))
    return 0


def read_options(args: argparse.Namespace) -> dict[str, Any]:
    """Our section of `--additional-config`, with the host memory of the command line.

    Raises:
        ConfigError: `--options` is no JSON object, or host memory is given twice or not at all.
    """
    try:
        options = json.loads(args.options)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--options is {args.options!r}: allowed is a JSON object ({error})") from None
    if not isinstance(options, dict):
        raise ConfigError(f"--options is {args.options!r}: allowed is a JSON object")
    in_options = options.get("host_memory_gib") is not None
    if in_options == (args.host_memory_gib is not None):
        given = "both" if in_options else "neither"
        raise ConfigError(f"--host-memory-gib and host_memory_gib in --options: {given} given, allowed is one of them")
    return options if in_options else options | {"host_memory_gib": args.host_memory_gib}


def read_model_fields(model: str) -> dict[str, Any]:
    """The fields of a model's configuration, those of the text model of a multi-modal one.

    Raises:
        ConfigError: the configuration cannot be read.
    """
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ConfigError(f"--model is {model}: reading it needs the package transformers, or use --shape") from None
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--model is {model}: allowed is a model's folder or id ({reason})") from None
    fields: dict[str, Any] = config.get_text_config().to_dict()
    return fields


def model_sizes(fields: dict[str, Any], dtype: str) -> "ModelSizes":
    """Read the sizes of the attention layers.

    Args:
        fields: the model's configuration.
        dtype: dtype to serve with, or `auto` for the model's.

    Raises:
        ConfigError: a field is missing, or the model is of a kind that the backend refuses.
    """
    import torch

    from flashmemory_vllm.runtime.forecast import ModelSizes

    missing = [name for name in ("num_hidden_layers", "num_attention_heads", "hidden_size") if not fields.get(name)]
    if missing:
        raise ConfigError(f"--model: its configuration has no {', '.join(missing)}, allowed is a decoder-only model")
    windows = fields.get("sliding_window") or set(fields.get("layer_types") or ()) - {"full_attention"}
    if windows or fields.get("kv_lora_rank"):
        raise ConfigError("--model: it has sliding-window, linear or MLA layers; allowed is full attention only")
    if dtype == "auto":
        dtype = str(fields.get("dtype") or "float32").removeprefix("torch.")
        # vLLM serves a float32 model in half precision unless told otherwise
        dtype = "bfloat16" if dtype == "float32" else dtype
    if dtype not in {"bfloat16", "float16", "float32"}:
        raise ConfigError(f"--model: its dtype is {dtype}, allowed: bfloat16, float16, float32")
    heads = fields["num_attention_heads"]
    return ModelSizes(
        num_layers=fields["num_hidden_layers"],
        num_query_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        dtype=getattr(torch, dtype),
    )


def device_memory(args: argparse.Namespace, fields: dict[str, Any], model: "ModelSizes") -> DeviceMemory:
    """Device bytes for KV: as given, or what the weights leave of the GPU.

    Raises:
        ConfigError: the weights leave nothing, cannot be estimated, or are given where nothing is subtracted.
    """
    if args.kv_cache_memory_bytes is not None:
        if args.weights_gib is not None:
            raise ConfigError("--weights-gib: given with --kv-cache-memory-bytes, allowed only with --gpu-memory-gib")
        return DeviceMemory(args.kv_cache_memory_bytes, None, is_estimate=False)
    is_estimate = args.weights_gib is None
    weights_bytes = estimate_weights_bytes(fields, model) if is_estimate else int(args.weights_gib * GIB)
    kv_bytes = int(args.gpu_memory_gib * GIB) - weights_bytes
    if kv_bytes <= 0:
        raise ConfigError(
            f"--gpu-memory-gib is {args.gpu_memory_gib}: allowed is more than the weights, "
            f"{weights_bytes / GIB:.2f} GiB{' (estimated)' if is_estimate else ''}"
        )
    return DeviceMemory(kv_bytes, weights_bytes, is_estimate)


def estimate_weights_bytes(fields: dict[str, Any], model: "ModelSizes") -> int:
    """Bytes of embeddings, attention and a gated feed-forward block in each layer; norms and biases are left out.

    Raises:
        ConfigError: the model is not a plain dense decoder.
    """
    needed = ("intermediate_size", "vocab_size")
    if any(fields.get(name) for name in NOT_PLAIN) or not all(isinstance(fields.get(name), int) for name in needed):
        raise ConfigError("--weights-gib is not given: this model's weights cannot be estimated, allowed is a number")
    hidden = fields["hidden_size"]
    embeddings = fields["vocab_size"] * hidden * (1 if fields.get("tie_word_embeddings") else 2)
    attention = 2 * hidden * (model.num_query_heads + model.num_kv_heads) * model.head_dim
    feed_forward = 3 * hidden * fields["intermediate_size"]
    parameters: int = embeddings + model.num_layers * (attention + feed_forward)
    return parameters * model.dtype.itemsize


def serve_command(args: argparse.Namespace, options: dict[str, Any]) -> str:
    """The `vllm serve` line of the plan; vLLM measures the device memory where it was not given."""
    words = ["vllm", "serve", args.model or "MODEL", "--attention-backend", "flashmemory"]
    words += ["--max-model-len", str(args.context), "--max-num-seqs", str(args.max_num_seqs)]
    words += ["--max-num-batched-tokens", str(args.max_num_batched_tokens), "--block-size", str(args.block_size)]
    if args.kv_dtype != "auto":
        words += ["--dtype", args.kv_dtype]
    if args.kv_cache_memory_bytes is not None:
        words += ["--kv-cache-memory-bytes", str(args.kv_cache_memory_bytes)]
    return shlex.join([*words, "--additional-config", json.dumps({SECTION: options})])


def as_json(memory: DeviceMemory, made: "Forecast", command: str) -> dict[str, Any]:
    """The plan with the unit in every name."""
    capacity = made.capacity
    return {
        "device_kv_bytes": memory.kv_bytes,
        "device_weights_bytes": memory.weights_bytes,
        "weights_are_estimated": memory.is_estimate,
        "request_kv_bytes": made.request_kv_bytes,
        "block_bytes": capacity.block_bytes,
        "num_slots": capacity.num_slots,
        "slot_bytes": capacity.slot_bytes,
        "index_bytes": capacity.index_bytes,
        "staging_bytes": capacity.staging.bytes,
        "num_logical_blocks": capacity.num_logical_blocks,
        "host_bytes": capacity.host_bytes,
        "request_decode_slots": made.request_decode_slots,
        "request_reserved_slots": capacity.request_slots,
        "num_requests": made.num_requests,
        "limited_by": made.limited_by,
        "dense_num_requests": made.dense_num_requests,
        "dense_break_even_requests": made.dense_num_requests + 1,
        "serve_command": command,
    }


def as_table(args: argparse.Namespace, memory: DeviceMemory, made: "Forecast", command: str) -> str:
    """The plan as text, a line a number, and the command to run."""
    capacity = made.capacity
    rows = [
        ("device memory for KV", _origin(args, memory)),
        ("KV of one request", f"{_gib(made.request_kv_bytes)} ({args.context:,} tokens)"),
        ("device slots", f"{capacity.num_slots:,} ({_gib(capacity.slot_bytes)})"),
        ("index keys", _gib(capacity.index_bytes)),
        ("staging", _gib(capacity.staging.bytes)),
        ("host blocks", f"{capacity.num_logical_blocks:,} ({_gib(capacity.host_bytes)})"),
        ("slots of one request", f"decodes with {made.request_decode_slots:,}, reserves {capacity.request_slots:,}"),
        ("requests at once", f"{made.num_requests:,} (limited by {made.limited_by})"),
        ("dense vLLM", f"{made.dense_num_requests:,} fit in the same device memory"),
        ("break-even", f"dense no longer fits from {made.dense_num_requests + 1:,} requests on"),
    ]
    return "\n".join([*(f"{name:<22}{value}" for name, value in rows), "", command])


def _origin(args: argparse.Namespace, memory: DeviceMemory) -> str:
    if memory.weights_bytes is None:
        return f"{_gib(memory.kv_bytes)} (given)"
    how = "estimated weights" if memory.is_estimate else "weights"
    weights = f"{args.gpu_memory_gib:g} - {how} {memory.weights_bytes / GIB:.2f}"
    return f"{_gib(memory.kv_bytes)} ({weights}; activations not subtracted)"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.3f} GiB"


def _check_ranges(args: argparse.Namespace) -> None:
    # A request that decodes has a prompt of at least one token
    smallest = {"context": 2, "max_num_seqs": 1, "max_num_batched_tokens": 1, "block_size": 1}
    for name, least in (smallest | {"kv_cache_memory_bytes": 1}).items():
        given = getattr(args, name)
        if given is not None and given < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {given}: allowed is {least} or more")
    for name in ("gpu_memory_gib", "weights_gib"):
        given = getattr(args, name)
        if given is not None and not (isfinite(given) and given > 0):
            raise ConfigError(f"--{name.replace('_', '-')} is {given}: allowed is a number > 0")
