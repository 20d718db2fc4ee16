"""What `flashmemory plan` prints."""

import argparse
import json
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashmemory_vllm.config import SECTION

if TYPE_CHECKING:
    from flashmemory_vllm.runtime.forecast import Forecast, ModelSizes
    from flashmemory_vllm.runtime.native import NativePool

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Where the bytes for KV on each GPU come from.

    Attributes:
        kv_bytes: what slots and all that is beside them may take.
        weights_bytes: what the weights take, or None if the bytes for KV were given.
        is_estimate: whether the weights were estimated from the model's configuration.
    """

    kv_bytes: int
    weights_bytes: int | None
    is_estimate: bool


def serve_command(args: argparse.Namespace, options: dict[str, Any]) -> str:
    """The `vllm serve` line of the plan; vLLM measures the device memory where it was not given."""
    words = ["vllm", "serve", args.model or "MODEL", "--attention-backend", "flashmemory"]
    words += ["--max-model-len", str(args.context), "--max-num-seqs", str(args.max_num_seqs)]
    words += ["--max-num-batched-tokens", str(args.max_num_batched_tokens), "--block-size", str(args.block_size)]
    changed = (("tensor_parallel_size", 1), ("dtype", "auto"), ("kv_cache_dtype", "auto"))
    for name, default in changed:
        if getattr(args, name) != default:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    if args.kv_cache_memory_bytes is not None:
        words += ["--kv-cache-memory-bytes", str(args.kv_cache_memory_bytes)]
    return shlex.join([*words, "--additional-config", json.dumps({SECTION: options})])


def as_json(
    args: argparse.Namespace, memory: DeviceMemory, model: "ModelSizes", made: "Forecast", command: str
) -> dict[str, Any]:
    """The plan with the unit in every name; sizes are those of each GPU."""
    capacity = made.capacity
    return {
        "tensor_parallel_size": args.tensor_parallel_size,
        "is_served_on_gpu": not model.is_latent,
        "device_kv_bytes": memory.kv_bytes,
        "device_weights_bytes": memory.weights_bytes,
        "weights_are_estimated": memory.is_estimate,
        "request_kv_bytes": made.request_kv_bytes,
        "block_bytes": capacity.block_bytes,
        "num_slots": capacity.num_slots,
        "slot_bytes": capacity.slot_bytes,
        "index_bytes": capacity.index_bytes,
        "checksum_bytes": capacity.checksum_bytes,
        "question_bytes": capacity.beside.question_bytes,
        "table_bytes": capacity.beside.table_bytes,
        "staging_bytes": capacity.beside.staging.bytes,
        "native_bytes": made.native_bytes,
        "native_blocks": made.native_blocks,
        "native_request_bytes": made.native.request_blocks * made.native.block_bytes if made.native else 0,
        "native_kept_prefixes": made.kept_prefixes(args.max_num_seqs) if made.native else 0,
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


def as_table(
    args: argparse.Namespace, memory: DeviceMemory, model: "ModelSizes", made: "Forecast", command: str
) -> str:
    """The plan as text, a line a number, and the command to run."""
    capacity = made.capacity
    rows = [
        ("device memory for KV", _origin(args, memory)),
        ("KV of one request", f"{_gib(made.request_kv_bytes)} ({args.context:,} tokens)"),
        ("device slots", f"{capacity.num_slots:,} ({_gib(capacity.slot_bytes)})"),
        ("index keys", _gib(capacity.index_bytes)),
        ("checksums", _gib(capacity.checksum_bytes)),
        ("questions", _gib(capacity.beside.question_bytes)),
        ("tables", _gib(capacity.beside.table_bytes)),
        ("staging", _gib(capacity.beside.staging.bytes)),
        ("host blocks", f"{capacity.num_logical_blocks:,} ({_gib(capacity.host_bytes)})"),
        ("slots of one request", f"decodes with {made.request_decode_slots:,}, reserves {capacity.request_slots:,}"),
        ("requests at once", f"{made.num_requests:,} (limited by {made.limited_by})"),
        ("dense vLLM", f"{made.dense_num_requests:,} fit in the same device memory"),
        ("break-even", f"dense no longer fits from {made.dense_num_requests + 1:,} requests on"),
    ]
    if made.native is not None:
        rows.insert(2, ("windows and states", _native(args, made, made.native)))
    if args.tensor_parallel_size > 1:
        rows.insert(0, ("GPUs", f"{args.tensor_parallel_size}, and of each of them:"))
    if model.is_latent:
        rows.insert(0, ("latent attention", "not served on a GPU yet, where a server refuses to start; on a CPU it is"))
    return "\n".join([*(f"{name:<22}{value}" for name, value in rows), "", command])


def _origin(args: argparse.Namespace, memory: DeviceMemory) -> str:
    if memory.weights_bytes is None:
        return f"{_gib(memory.kv_bytes)} (given)"
    how = "estimated weights" if memory.is_estimate else "weights"
    weights = f"{args.gpu_memory_gib:g} - {how} {memory.weights_bytes / GIB:.2f}"
    return f"{_gib(memory.kv_bytes)} ({weights}; activations not subtracted)"


def _native(args: argparse.Namespace, made: "Forecast", native: "NativePool") -> str:
    one = _gib(native.request_blocks * native.block_bytes)
    kept = made.kept_prefixes(args.max_num_seqs)
    return (
        f"{_gib(made.native_bytes)} ({made.native_blocks:,} blocks; a request in prefill takes up to {one}; beside all "
        f"requests the ends of {kept:,} prefixes are kept)"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.3f} GiB"
