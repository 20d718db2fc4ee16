"""The process behind tests of a plain `vllm.LLM`: its arguments as JSON on standard input, what it does on output."""

import json
import sys


def main() -> None:
    """Start the engine in the way that vLLM chooses, generate a few tokens, and print whether the engine was forked."""
    from vllm import LLM, SamplingParams
    from vllm.utils.system_utils import get_mp_context

    llm = LLM(**json.load(sys.stdin))
    sampling = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": list(range(2, 100))}], sampling, use_tqdm=False)
    found = {"tokens": list(output.outputs[0].token_ids), "start": get_mp_context().get_start_method()}
    sys.stdout.write(f"\n{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
