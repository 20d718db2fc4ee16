"""A broken selector for a real server: what `exact` would keep goes first. Another entry point loads it beside ours."""

import configparser
from pathlib import Path

from flashmemory_vllm.indexer import factory
from flashmemory_vllm.indexer.exact import ExactSelector
from flashmemory_vllm.indexer.places import DueRows, PlaceState

NAME = "worst_selector"


class WorstSelector(ExactSelector):
    """Keeps the blocks that the last token attends to least."""

    def remember(self, due: DueRows, state: PlaceState) -> None:
        """What `exact` remembers, upside down."""
        super().remember(due, state)
        places = due.places
        state.memory[:, :, places] = 1 - state.memory[:, :, places]


def register() -> None:
    """Put it in the place of `exact`, in every process of vLLM."""
    factory._SELECTORS[ExactSelector.name] = WorstSelector


def write_entry_point(folder: Path) -> None:
    """Write the metadata of an installed distribution with `register`, which vLLM loads if VLLM_PLUGINS names it.

    Args:
        folder: for `PYTHONPATH`.
    """
    info = folder / f"{NAME}-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n")
    parser = configparser.ConfigParser()
    parser["vllm.general_plugins"] = {NAME: f"{__name__}:register"}
    with (info / "entry_points.txt").open("w", encoding="utf-8") as file:
        parser.write(file)
