"""`vllm.LLM` in a script of a user's: nothing of vLLM or ours was called before."""

import subprocess
import sys
from pathlib import Path

from flashmemory_vllm.reference import reference_model_path
from tests.helpers.engine import EngineRun, engine_environment

SCRIPT = """
from vllm import LLM

try:
    LLM({model!r}, attention_config={{"backend": "flashmemory"}}, max_model_len=4096, additional_config={{
        "flashmemory": {{"resident_ratio": 1.5}}
    }})
finally:
    print("the script goes on to its end")
"""


def test_a_backend_in_the_attention_config_is_known_and_a_refusal_is_one_line(tmp_path: Path) -> None:
    """The configuration is made from text before vLLM loads general plugins."""
    model = reference_model_path()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(model=str(model))],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=engine_environment(EngineRun(model, [], 0)),
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "the script goes on to its end"
    assert (
        done.stderr.splitlines()[-1]
        == "ConfigError: flashmemory.resident_ratio is 1.5: allowed is a number > 0 and <= 1"
    )
    assert "Traceback" not in done.stderr
