"""What the options of `flashmemory bench` choose, whatever the kind of its scenarios: names, and a model."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flashmemory_vllm.cli.shapes import shape_fields
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.files import write_json
from flashmemory_vllm.reference import reference_model_path


def chosen_names(option: str, text: str, known: Iterable[str]) -> list[str]:
    """Names of an option that takes several with commas between, each once.

    Raises:
        ConfigError: one is unknown.
    """
    allowed = dict.fromkeys(known)
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in allowed]:
        raise ConfigError(f"{option} has {', '.join(map(repr, unknown))}: allowed is {', '.join(allowed)}")
    return list(dict.fromkeys(names))


def check_names(names: Sequence[str]) -> None:
    """Refuse scenarios that share a name.

    Raises:
        ConfigError: some do.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"scenarios named {', '.join(twice)} twice: allowed are different names")


def model_arguments(model: str | None, shape: str | None, num_layers: int | None = None) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that say what to serve.

    A shape's configuration lies in the user's cache, always in the same folder: vLLM's compilation cache goes by it.

    Args:
        model: folder or id, or None.
        shape: name of a shape, or None. Without either it is the shipped model.
        num_layers: the first so many layers of the shape. Default: all.

    Raises:
        ConfigError: the shape has not so many, or there is none.
    """
    if shape is None:
        if num_layers is not None:
            raise ConfigError(f"--layers is {num_layers} without --shape: allowed is unset")
        return {"model": model or str(reference_model_path())}
    fields = shape_fields(shape, num_layers)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = shape if num_layers is None else f"{shape}-{num_layers}"
    folder = cache / "flashmemory" / "shapes" / name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", fields)
    return {"model": str(folder), "load_format": "dummy"}
