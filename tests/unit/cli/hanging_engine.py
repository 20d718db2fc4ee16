"""Stands in for what a command starts: has a child in a session of its own, as vLLM has, and gets nowhere."""

import os
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(6000)"], start_new_session=True)
    folder = Path(os.environ["HANGING_ENGINE"])
    (folder / "new").write_text(f"{os.getpid()} {child.pid}")
    (folder / "new").rename(folder / "pids")
    time.sleep(6000)
