"""The process behind `flashmemory capture`, with the engine in it; takes the words of the command."""

import sys

from flashmemory_vllm.cli import app, capture

if __name__ == "__main__":
    sys.exit(app.main(sys.argv[1:], capture.run_here))
