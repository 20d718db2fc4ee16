"""Rows of benchmarks that others defined, and what their runners ask of a server before they start."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.files import write_json

if TYPE_CHECKING:
    from openai import OpenAI

T = TypeVar("T")
API_KEY_VARIABLE = "OPENAI_API_KEY"
INSTALL_HINT = "pip install 'flashmemory-vllm[eval]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class StandardRow:
    """One measured cell with what it was measured with.

    Attributes:
        suite: name of the benchmark.
        task: name of the task, as the benchmark has it.
        tokens: what the benchmark limits a prompt to, in tokens of the model's tokenizer.
        questions: how many were asked.
        accuracy: the benchmark's own score, from 0 to 1.
        stderr: standard error of `accuracy`, where it is known.
        unparsable: answers without the form that the benchmark asks for, where it asks for one.
        truncated: prompts that were cut to `tokens`, where the benchmark cuts.
        model: name of the model at the server.
        tokenizer: folder or Hugging Face id.
        settings: what else decides which questions are asked and how.
        command: see `Provenance`, as are commit, gpu and versions.
        commit: commit of the checkout.
        gpu: name of the device.
        versions: version by distribution.
    """

    suite: str
    task: str
    tokens: int
    questions: int
    accuracy: float
    stderr: float | None = None
    unparsable: int | None = None
    truncated: int | None = None
    model: str
    tokenizer: str
    settings: dict[str, Any]
    command: str
    commit: str
    gpu: str
    versions: dict[str, str]

    @property
    def cell(self) -> str:
        """Equal for rows that answer the same question."""
        return cell_key(self.suite, self.task, self.tokens, self.model, self.tokenizer, self.settings)


def cell_key(suite: str, task: str, tokens: int, model: str, tokenizer: str, settings: Mapping[str, object]) -> str:
    """What tells cells apart, see `StandardRow`."""
    return json.dumps([suite, task, tokens, model, tokenizer, settings], sort_keys=True)


def load_rows(path: Path) -> list[StandardRow]:
    """Read a file of rows; a missing file has none.

    Raises:
        ConfigError: the file is no list of such rows.
    """
    if not path.exists():
        return []
    try:
        return [StandardRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        names = ", ".join(field.name for field in fields(StandardRow))
        raise ConfigError(f"{path} ({error}): allowed is a JSON list of objects with {names}") from None


def save_rows(path: Path, rows: Sequence[StandardRow]) -> None:
    """Write a file of rows; whoever reads it meets the old ones or the new ones, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [asdict(row) for row in rows])


def api_url(base_url: str) -> str:
    """URL of the OpenAI API: `http://host:8000` and `http://host:8000/v1` mean the same."""
    return base_url.rstrip("/").removesuffix("/v1") + "/v1"


def open_client(base_url: str, timeout_seconds: float) -> "OpenAI":
    """A client of the server; the API key is taken from the environment variable `OPENAI_API_KEY`.

    Args:
        base_url: the server, with or without `/v1`.
        timeout_seconds: how long one answer may take.

    Raises:
        ConfigError: the client's package is not installed.
    """
    try:
        from openai import OpenAI
    except ImportError as error:
        raise ConfigError(f"openai is not installed: {INSTALL_HINT}") from error
    key = os.environ.get(API_KEY_VARIABLE, "none")
    return OpenAI(base_url=api_url(base_url), api_key=key, timeout=timeout_seconds, max_retries=4)


def read_max_model_len(client: "OpenAI", model: str) -> int:
    """Most tokens of prompt and answer that the server takes for a model.

    Args:
        client: of the server.
        model: name of the model at the server.

    Raises:
        ConfigError: the server does not answer, does not serve the model, or does not tell.
    """
    from openai import OpenAIError

    try:
        served = {card.id: getattr(card, "max_model_len", None) for card in client.models.list()}
    except OpenAIError as error:
        raise ConfigError(f"base_url is {client.base_url}: no list of models came from there ({error})") from error
    if model not in served:
        raise ConfigError(f"model is {model!r}: allowed is what {client.base_url} serves, {', '.join(served)}")
    max_model_len = served[model]
    if max_model_len is None:
        raise ConfigError(f"base_url is {client.base_url}: it does not tell max_model_len, allowed is a vLLM server")
    return int(max_model_len)


def run_all(functions: Sequence[Callable[[], T]], num_threads: int) -> Iterator[T]:
    """Call functions in threads.

    Args:
        functions: called once each, the first ones first.
        num_threads: how many run at once.

    Yields:
        What they return, as they finish. After the first failure none is started; those that run may finish.

    Raises:
        BaseException: the first failure, when no function runs any more.
    """
    failures: list[BaseException] = []
    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(function) for function in functions]
        try:
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                if failure := future.exception():
                    failures.append(failure)
                    _cancel(futures)
                else:
                    yield future.result()
        finally:
            _cancel(futures)
    if failures:
        raise failures[0]


def _cancel(futures: Sequence[Future[T]]) -> None:
    for future in futures:
        future.cancel()
