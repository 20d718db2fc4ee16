"""Lets vLLM's processes find our plugin where the package is on the path but not installed.

`python -m tests.helpers.entry_points FOLDER` writes the folder and prints it, for `PYTHONPATH`.
"""

import atexit
import configparser
import functools
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from flashmemory_vllm import __version__

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@functools.cache
def entry_point_folder() -> Path:
    """A temporary folder for `PYTHONPATH` with our entry points; removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="flashmemory-entry-points-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_entry_points(folder)
    return folder


def write_entry_points(folder: Path) -> None:
    """Write the metadata of an installed distribution that has our entry points and nothing else.

    Args:
        folder: where to; created.
    """
    project: dict[str, Any] = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    groups: dict[str, dict[str, str]] = {"console_scripts": project["scripts"], **project["entry-points"]}
    info = folder / f"{project['name'].replace('-', '_')}-{__version__}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {__version__}\n")
    parser = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    parser.read_dict(groups)
    with (info / "entry_points.txt").open("w", encoding="utf-8") as file:
        parser.write(file)


if __name__ == "__main__":
    write_entry_points(Path(sys.argv[1]))
    sys.stdout.write(f"{Path(sys.argv[1]).resolve()}\n")
