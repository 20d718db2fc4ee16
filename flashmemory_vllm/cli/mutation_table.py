"""The table of deliberate bugs and the tests that caught them."""

import json
from pathlib import Path

from flashmemory_vllm.cli.markdown import table
from flashmemory_vllm.errors import ConfigError


def mutations_table(folder: Path) -> str:
    """Each bug, where it was planted, and the test that failed.

    Args:
        folder: `docs/`; the rows are `results/mutations.json`, which `python -m tests.mutations` writes.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = folder / "results" / "mutations.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): allowed is a JSON list of rows") from None
    cells = ((row["bug"], f"`{row['path']}`", row["outcome"], f"`{row['test']}`") for row in rows)
    return table(("bug", "planted in", "outcome", "test"), cells)
