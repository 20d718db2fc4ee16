"""How vLLM's CPU backend grows with the lengths of its batches, by itself: `python tests/tools/product_cache.py`.

Its linear layers are oneDNN's, which keeps a program and buffers for each shape of a product, up to
`ONEDNN_PRIMITIVE_CACHE_CAPACITY` (1,024 by default) of them. Prints MiB of the process after so many lengths.
"""

import ctypes
import json
import random
import resource
import sys
from pathlib import Path

import torch
import vllm._C  # noqa: F401 - registers the operators
from vllm import _custom_ops as ops

from flashmemory_vllm.reference import reference_model_path

MIB = 1 << 20
NUM_LENGTHS = 384
TOLD_EVERY = 64
# vLLM's own, of `dispatch_cpu_unquantized_gemm`
KEPT_BY_A_LAYER = 32


def main() -> None:
    """Multiply batches of ever other lengths with the weights of the shipped model's sizes."""
    sizes = json.loads((reference_model_path() / "config.json").read_text(encoding="utf-8"))
    hidden, inner, head = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    weights = [(hidden, (heads + 2 * kv_heads) * head), (heads * head, hidden), (hidden, 2 * inner), (inner, hidden)]
    layers = [
        (wide, ops.create_onednn_mm(torch.randn(out, wide).t(), KEPT_BY_A_LAYER))
        for wide, out in weights * sizes["num_hidden_layers"]
    ]
    lengths = list(range(1, NUM_LENGTHS + 1))
    random.Random(0).shuffle(lengths)
    for index, length in enumerate(lengths):
        if index % TOLD_EVERY == 0:
            _tell(index)
        for wide, layer in layers:
            ops.onednn_mm(layer, torch.randn(length, wide), None)
    _tell(NUM_LENGTHS)


def _tell(num_lengths: int) -> None:
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    sys.stdout.write(f"{num_lengths:4d} lengths: {pages * resource.getpagesize() / MIB:7.1f} MiB\n")


if __name__ == "__main__":
    main()
