"""How long a recorder takes beside a model: a decode step of some requests, and text behind one prompt.

    python -m tests.tools.recorder_speed [--requests 16] [--tokens 3000] [--text 256]

Heads and layers are those of SmolLM2-135M: 30 layers, 9 query and 3 KV heads of 64; on one core, in bfloat16. The row
of a run, CPU milliseconds, goes to standard output as JSON; `docs/results/capture.json` has some.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence

import torch

from flashmemory_vllm.capture.passes import BatchRow
from flashmemory_vllm.capture.recorder import Choices, Recorder, RecorderSettings

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, ANCHORS = 30, 9, 3, 64, 32, (10, 15, 20)
STEPS = 3


def main(words: Sequence[str]) -> int:
    """Measure what the words ask for."""
    parser = argparse.ArgumentParser(description="how long a recorder takes beside a model")
    parser.add_argument("--requests", type=int, default=16, help="rows of a decode step. Default: %(default)s")
    parser.add_argument("--tokens", type=int, default=3000, help="tokens of each. Default: %(default)s")
    parser.add_argument("--text", type=int, default=256, help="tokens behind a prompt. Default: %(default)s")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    width = -(-args.tokens // BLOCK_SIZE)
    pages = torch.randn(args.requests * width + 1, KV_HEADS, BLOCK_SIZE, HEAD_DIM).bfloat16()
    slots = torch.arange(1, args.requests * width + 1, dtype=torch.int32).view(args.requests, width)
    choices = Choices(every=1, chunk_size=4, query_window=16, layer_mass=False)
    settings = RecorderSettings(LAYERS, QUERY_HEADS, KV_HEADS * HEAD_DIM, ANCHORS, BLOCK_SIZE, HEAD_DIM**-0.5, choices)
    recorder = Recorder(settings, lambda _, wanted: pages.index_select(0, wanted))

    def run(rows: Sequence[BatchRow]) -> float:
        query = torch.randn(sum(row.num_tokens for row in rows), QUERY_HEADS, HEAD_DIM).bfloat16()
        began = time.process_time()
        recorder.begin(rows)
        for layer in range(LAYERS):
            recorder.layer(layer, query)
        recorder.end()
        return (time.process_time() - began) * 1000

    prompt_len = args.tokens - args.text
    names = [str(row) for row in range(args.requests)]
    # Prompts of no tokens to be recorded, so that requests are known
    run([BatchRow(name, args.tokens, 0, prompt_len, slots[row]) for row, name in enumerate(names)])
    steps = [
        run([BatchRow(name, prompt_len, prompt_len + step, 1, slots[row]) for row, name in enumerate(names)])
        for step in range(STEPS)
    ]
    text = run([BatchRow(names[0], prompt_len + 1, prompt_len, args.text, slots[0])])
    row = {
        **vars(args),
        "decode_step_ms": round(min(steps)),
        "decode_ms_per_token": round(min(steps) / args.requests, 1),
        "text_ms_per_token": round(text / args.text, 1),
    }
    sys.stdout.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
