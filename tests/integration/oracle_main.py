"""Asks what a capture asked, with a selector that knows the future: JSON in, one marked line of JSON out."""

import json
import sys
from pathlib import Path

from tests.helpers.engine import RESULT_MARK


def main() -> None:
    """Generate and print answers and counters."""
    from flashmemory_vllm.indexer.oracle import Future
    from flashmemory_vllm.plugin.capture import OracleGenerator

    request = json.load(sys.stdin)
    future = Future.load(Path(request["capture"]))
    with OracleGenerator(future, request["model"], request["engine"], request["options"], (2,)) as generator:
        answers = [generator.generate(prompts, request["limits"]) for prompts in request["rounds"]]
        result = {"answers": answers, "counters": generator.counters()}
    sys.stdout.write(f"\n{RESULT_MARK}{json.dumps(result)}\n")


if __name__ == "__main__":
    main()
