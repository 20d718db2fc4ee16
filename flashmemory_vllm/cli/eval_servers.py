"""The two servers of `flashmemory eval`, started or given: stock vLLM for dense attention, this backend for sparse."""

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flashmemory_vllm.cli.server import Server
from flashmemory_vllm.config import SECTION
from flashmemory_vllm.errors import ConfigError, FlashMemoryError
from flashmemory_vllm.evaluation.eval_rows import Side
from flashmemory_vllm.evaluation.target import FORCED_TOKENS, Target
from flashmemory_vllm.files import write_text

BACKEND, ADDITIONAL = "attention-backend", "additional-config"
KV_BYTES = "kv-cache-memory-bytes"


@dataclass(frozen=True, slots=True)
class ServerChoice:
    """One server: a URL, or how to start it.

    Attributes:
        side: which one it is.
        model: folder or Hugging Face id.
        name: name of the model at the server.
        url: a running server; None to start one.
        config: what `vllm serve --config` is to read.
        arguments: further arguments of `vllm serve`, which override it.
        startup_seconds: how long to wait until it is up.
        is_forced: it is to be forced along texts. Answers do not change by that, nor does the description: the suite
            `loss` may come on top of others.
    """

    side: Side
    model: str
    name: str
    url: str | None
    config: Mapping[str, Any]
    arguments: Sequence[str]
    startup_seconds: float
    is_forced: bool = False

    @property
    def description(self) -> str:
        """Equal for servers that answer alike, as far as one can tell from here."""
        if self.url is not None:
            return self.url
        words = ["vllm", "serve", self.model, *self.arguments]
        return f"{shlex.join(words)} with {json.dumps(self.config, sort_keys=True)}"

    @property
    def all_arguments(self) -> list[str]:
        """What `vllm serve` is started with beside its configuration."""
        return [*self.arguments, *(("--logits-processors", FORCED_TOKENS) if self.is_forced else ())]

    @contextmanager
    def running(self, folder: Path) -> Iterator[Target]:
        """The server, up; one that is started here is stopped at the end.

        Args:
            folder: for `serve-dense.yaml` or `serve-sparse.yaml`, what the server was started with, and its log.

        Raises:
            ConfigError: there is no such server or model.
            FlashMemoryError: the server did not start.
        """
        if self.url is not None:
            yield Target.connect(self.side, self.url, self.name)
            return
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"serve-{self.side}.yaml"
        write_text(file, yaml.safe_dump(dict(self.config), sort_keys=False))
        path = Path(self.model)
        model = path if path.is_dir() else self.model
        log = folder / f"serve-{self.side}.log"
        started = Server(model, file, self.startup_seconds, self._environment(), self.all_arguments, self.name, log)
        with started as server:
            try:
                yield Target.connect(self.side, server.url, self.name)
            except ConfigError:
                raise
            except FlashMemoryError as error:
                raise FlashMemoryError(f"{error}; what the server printed is in {log}") from error

    def _environment(self) -> dict[str, str]:
        """Nothing of this package is loaded into the dense server."""
        return dict(os.environ) | ({"VLLM_PLUGINS": ""} if self.side == "dense" else {})


def read_config(path: Path) -> dict[str, Any]:
    """What a file for `vllm serve --config` holds, without the model.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config is {path} ({error}): allowed is a YAML file for vllm serve --config") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--config is {path}: allowed is a YAML file of options, it has none")
    return {name: value for name, value in found.items() if name != "model"}


def sparse_config(config: Mapping[str, Any], additional: str | None) -> dict[str, Any]:
    """Options of the sparse server: those of the file, our backend, and on top `--additional-config`.

    Args:
        config: what `read_config` read; may be empty.
        additional: JSON of the option, such as `{"flashmemory": {"resident_ratio": 0.2}}`, or None.

    Raises:
        ConfigError: `additional` is no such JSON.
    """
    given = _read_additional(additional)
    merged = dict(config.get(ADDITIONAL) or {}) | given
    ours = dict((config.get(ADDITIONAL) or {}).get(SECTION) or {}) | dict(given.get(SECTION) or {})
    if ours:
        merged[SECTION] = ours
    return {BACKEND: SECTION, **config} | ({ADDITIONAL: merged} if merged else {})


def dense_config(config: Mapping[str, Any], kv_bytes: int | None) -> dict[str, Any]:
    """Options of the dense server: those of the file without what only our backend knows or is sized for.

    Args:
        config: what `read_config` read; may be empty.
        kv_bytes: bytes of KV cache; None for vLLM's own choice.
    """
    kept = {name: value for name, value in config.items() if name not in {BACKEND, ADDITIONAL, KV_BYTES}}
    additional = {name: value for name, value in (config.get(ADDITIONAL) or {}).items() if name != SECTION}
    if additional:
        kept[ADDITIONAL] = additional
    return kept if kv_bytes is None else kept | {KV_BYTES: kv_bytes}


def split_arguments(option: str, text: str | None) -> list[str]:
    """Words of an option that holds arguments.

    Raises:
        ConfigError: a quotation does not end.
    """
    try:
        return shlex.split(text or "")
    except ValueError as error:
        raise ConfigError(f"{option} is {text!r} ({error}): allowed are arguments as a shell takes them") from error


def _read_additional(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get(SECTION, {}), dict):
        raise ConfigError(
            f"--additional-config is {text!r}: allowed is a JSON object such as "
            f'{{"{SECTION}": {{"resident_ratio": 0.2}}}}'
        )
    return found
