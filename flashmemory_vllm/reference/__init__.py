"""The small decoder that the project ships: its accuracy instrument and the default of its demo."""

from pathlib import Path


def reference_model_path() -> Path:
    """Folder of the shipped checkpoint, tokenizer included, ready for `vllm serve`."""
    return Path(__file__).parent / "model"


def reference_indexer_path() -> Path:
    """Folder of the indexer that was trained for the shipped model, in blocks of 32 tokens; see its card there."""
    return Path(__file__).parent / "indexer"
