"""`flashmemory plan`: what a server would size and how many long requests it would decode, before there is one."""

import argparse
import json
from math import isfinite
from typing import TYPE_CHECKING, Any

from flashmemory_vllm.cli.plan_layers import LayerKinds, layer_kinds
from flashmemory_vllm.cli.plan_text import GIB, DeviceMemory, as_json, as_table, serve_command
from flashmemory_vllm.cli.shapes import SHAPES
from flashmemory_vllm.config import SECTION, FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError

if TYPE_CHECKING:
    from flashmemory_vllm.runtime.forecast import ModelSizes

# Those that the server accepts, for weights and for KV
DTYPES = ("auto", "bfloat16", "float16", "float32")
POSITIVE = ("max_num_seqs", "max_num_batched_tokens", "block_size", "tensor_parallel_size", "kv_cache_memory_bytes")
# Fields of configurations whose weights are not those of a plain dense decoder
NOT_PLAIN = (
    *("num_experts", "num_local_experts", "n_routed_experts", "quantization_config", "layers_block_type"),
    *("linear_num_value_heads", "kv_lora_rank"),
)
# Families that Transformers does not know by their name, and whose configuration theirs is, for vLLM as well
READ_AS = {"kimi_k2": "deepseek_v3"}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `plan` command."""
    parser = subparsers.add_parser("plan", help="what a server would size, and how many requests fit")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="folder or Hugging Face id of a model; only its configuration is read")
    model.add_argument("--shape", choices=tuple(SHAPES), help="sizes of a well-known model, without reading one")
    device = parser.add_mutually_exclusive_group(required=True)
    device.add_argument("--gpu-memory-gib", type=float, help="GiB of each GPU, of which its weights are subtracted")
    device.add_argument("--kv-cache-memory-bytes", type=int, help="bytes for KV on each GPU, as vLLM's option")
    parser.add_argument("--weights-gib", type=float, help="GiB of the weights on each GPU. Default: estimated")
    parser.add_argument("--host-memory-gib", type=float, help=f"GiB of host memory for all: {SECTION}.host_memory_gib")
    parser.add_argument("--context", type=int, required=True, help="tokens of a request: --max-model-len")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="requests at once. Default: %(default)s")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=8192, help="tokens of a step. Default: %(default)s"
    )
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a block. Default: %(default)s")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs. Default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the weights. Default: the model's")
    parser.add_argument("--kv-cache-dtype", choices=DTYPES, default="auto", help="dtype of KV. Default: --dtype")
    parser.add_argument("--options", default="{}", help=f"JSON object: the section {SECTION} of --additional-config")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from flashmemory_vllm.runtime.forecast import ServerSizes, forecast

    _check_ranges(args)
    options = read_options(args)
    config = FlashMemoryConfig.from_additional_config({SECTION: options})
    fields = SHAPES[args.shape].fields if args.shape else read_model_fields(args.model)
    kinds = layer_kinds(fields, args.context)
    model = model_sizes(fields, args.dtype, args.kv_cache_dtype, kinds)
    memory = device_memory(args, fields, model.of_rank(args.tensor_parallel_size))
    server = ServerSizes(
        device_bytes=memory.kv_bytes,
        context_tokens=args.context,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        block_size=args.block_size,
        tensor_parallel_size=args.tensor_parallel_size,
    )
    made = forecast(model, config, server)
    command = serve_command(args, options)
    print(
        json.dumps(as_json(args, memory, model, made, command), indent=2)
        if args.json
        else as_table(args, memory, model, made, command)
    )
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
        from transformers import AutoConfig, PreTrainedConfig
    except ImportError:
        raise ConfigError(f"--model is {model}: reading it needs the package transformers, or use --shape") from None
    try:
        stored, _ = PreTrainedConfig.get_config_dict(model)
        family = stored.pop("model_type", None)
        config = (
            AutoConfig.for_model(READ_AS[family], **stored)
            if family in READ_AS
            else AutoConfig.from_pretrained(model, trust_remote_code=False)
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--model is {model}: allowed is a model's folder or id ({reason})") from None
    fields: dict[str, Any] = config.get_text_config().to_dict()
    return fields | {"model_type": family} if family in READ_AS else fields


def model_sizes(
    fields: dict[str, Any], dtype: str, kv_dtype: str = "auto", kinds: LayerKinds | None = None
) -> "ModelSizes":
    """Read the sizes of the attention layers.

    Args:
        fields: the model's configuration.
        dtype: dtype to serve with, or `auto` for the model's.
        kv_dtype: dtype of keys and values, or `auto` for that of the weights.
        kinds: of its layers. Default: those of requests of any length.

    Raises:
        ConfigError: a field is missing, or the model is of a kind that the backend refuses.
    """
    import torch

    from flashmemory_vllm.runtime.forecast import ModelSizes

    kinds = layer_kinds(fields) if kinds is None else kinds
    if dtype == "auto":
        dtype = str(fields.get("dtype") or "float32").removeprefix("torch.")
        # vLLM serves a float32 model in half precision unless told otherwise
        dtype = "bfloat16" if dtype == "float32" else dtype
    if dtype not in DTYPES:
        raise ConfigError(f"--model: its dtype is {dtype}, allowed: {', '.join(DTYPES[1:])}")
    heads = fields["num_attention_heads"]
    num_kv_heads, head_dim = fields.get("num_key_value_heads") or heads, fields.get("head_dim")
    latent_dim = fields.get("kv_lora_rank")
    if latent_dim:
        # One key for all heads: the latent, and behind it what has a position
        num_kv_heads, head_dim = 1, latent_dim + fields["qk_rope_head_dim"]
    return ModelSizes(
        layers=kinds.full,
        num_query_heads=heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim or fields["hidden_size"] // heads,
        dtype=getattr(torch, dtype),
        kv_dtype=getattr(torch, dtype if kv_dtype == "auto" else kv_dtype),
        num_window_layers=kinds.num_windows,
        window=kinds.window,
        num_state_layers=kinds.num_states,
        state=kinds.state,
        page_dim=head_dim if latent_dim else None,
    )


def device_memory(args: argparse.Namespace, fields: dict[str, Any], model: "ModelSizes") -> DeviceMemory:
    """Bytes for KV on each GPU: as given, or what its weights leave.

    Args:
        args: the command line.
        fields: the model's configuration.
        model: sizes of the model on one GPU.

    Raises:
        ConfigError: the weights leave nothing, cannot be estimated, or are given where nothing is subtracted.
    """
    if args.kv_cache_memory_bytes is not None:
        if args.weights_gib is not None:
            raise ConfigError("--weights-gib: given with --kv-cache-memory-bytes, allowed only with --gpu-memory-gib")
        return DeviceMemory(args.kv_cache_memory_bytes, None, is_estimate=False)
    is_estimate = args.weights_gib is None
    weights_bytes = (
        estimate_weights_bytes(fields, model, args.tensor_parallel_size) if is_estimate else int(args.weights_gib * GIB)
    )
    kv_bytes = int(args.gpu_memory_gib * GIB) - weights_bytes
    if kv_bytes <= 0:
        raise ConfigError(
            f"--gpu-memory-gib is {args.gpu_memory_gib}: allowed is more than the weights, "
            f"{weights_bytes / GIB:.2f} GiB{' (estimated)' if is_estimate else ''}"
        )
    return DeviceMemory(kv_bytes, weights_bytes, is_estimate)


def estimate_weights_bytes(fields: dict[str, Any], model: "ModelSizes", num_ranks: int = 1) -> int:
    """Bytes of embeddings, attention and a gated feed-forward block in each layer; norms and biases are left out.

    Args:
        fields: the model's configuration.
        model: sizes of the model on one rank.
        num_ranks: ranks that share what is not attention evenly.

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
    num_layers = model.num_layers + model.num_window_layers
    shared = embeddings + num_layers * feed_forward
    parameters: int = shared // num_ranks + num_layers * attention
    return parameters * model.dtype.itemsize


def _check_ranges(args: argparse.Namespace) -> None:
    # A request that decodes has a prompt of at least one token
    smallest = {"context": 2} | dict.fromkeys(POSITIVE, 1)
    for name, least in smallest.items():
        given = getattr(args, name)
        if given is not None and given < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {given}: allowed is {least} or more")
    for name in ("gpu_memory_gib", "weights_gib"):
        given = getattr(args, name)
        if given is not None and not (isfinite(given) and given > 0):
            raise ConfigError(f"--{name.replace('_', '-')} is {given}: allowed is a number > 0")
