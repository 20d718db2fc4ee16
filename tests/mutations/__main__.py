"""`python -m tests.mutations`: plant each bug in a copy of the checkout and demand that its test fails.

Writes `docs/results/mutations.json`, from which `flashmemory docs` makes the table of docs/reliability.md. Ends with 1
if a bug is not caught.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.mutations.catalogue import MUTATIONS
from tests.mutations.mutation import ROOT, Mutation

RESULTS = ROOT / "docs" / "results" / "mutations.json"
# Against hanging for ever: a bug may well make its test hang
TEST_SECONDS = 600
PASSED, FAILED = 0, 1


def git(*arguments: str) -> str:
    """What git says about this checkout."""
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def copy_checkout(target: Path) -> None:
    """Copy what git knows or would take, so that no build folder comes along."""
    for name in filter(None, git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def run_tests(root: Path, *tests: str) -> int | None:
    """Pytest's exit code for tests in a copy of the checkout; None if one hangs."""
    python = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider", *tests]
    paths = os.pathsep.join((str(root), str(root / "kernels")))
    # Two versions of a file may have one size and one time: no byte code is kept
    environment = dict(os.environ) | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        ended = subprocess.run(
            python, cwd=root, env=environment, capture_output=True, timeout=TEST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return ended.returncode


def outcome(root: Path, mutation: Mutation) -> str:
    """`caught`, `missed`, or why neither can be said. The copy is as before afterwards."""
    file = root / mutation.path
    source = file.read_text(encoding="utf-8")
    mutation.apply(root)
    try:
        code = run_tests(root, mutation.test)
    finally:
        file.write_text(source, encoding="utf-8")
    if code == FAILED:
        return "caught"
    return "missed" if code == PASSED else f"pytest ended with {code}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bugs that are asked for, and write how they ended beside what is known of the others."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("words", nargs="*", help="only bugs whose name has one of these. Default: all")
    words = parser.parse_args(argv).words
    chosen = [mutation for mutation in MUTATIONS if not words or any(word in mutation.bug for word in words)]
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    found = {(row["bug"], row["path"], row["test"]): row["outcome"] for row in known}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy_checkout(root)
        if run_tests(root, *sorted({one.test for one in chosen})) != PASSED:
            sys.stdout.write("a test fails without any bug: run them with pytest first\n")
            return 1
        for one in chosen:
            found[one.key] = outcome(root, one)
            sys.stdout.write(f"{found[one.key]:8} {one.bug}\n")
            sys.stdout.flush()
    rows = [
        {"bug": one.bug, "path": one.path, "test": one.test, "outcome": found[one.key]}
        for one in MUTATIONS
        if one.key in found
    ]
    RESULTS.write_text(f"{json.dumps(rows, indent=1)}\n", encoding="utf-8")
    return 0 if all(found[one.key] == "caught" for one in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
