"""What is asked while a model is recorded."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.texts import common_start, json_lines


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    Attributes:
        ids: token ids.
        max_tokens: tokens to generate at most.
        group: prompts of one group share text, so that a split into training and validation keeps them together.
        answer: first and last output token that the prompt was asked for. Default: unknown.
        forced: the text that goes on, `max_tokens` of it, which is recorded in place of an answer. Default: none, the
            model answers.
    """

    ids: tuple[int, ...]
    max_tokens: int
    group: int
    answer: tuple[int, int] | None = None
    forced: tuple[int, ...] = ()

    @property
    def digest(self) -> bytes:
        """32 bytes that tell prompts apart."""
        return prompt_digest(self.ids)


def prompt_digest(ids: Sequence[int]) -> bytes:
    """SHA-256 of token ids (int32, little endian)."""
    return hashlib.sha256(np.asarray(ids, "<i4").tobytes()).digest()


def digest_of_all(prompts: Sequence[Prompt]) -> str:
    """One hexadecimal digest of prompts in their order, and of how many and which tokens may follow each."""
    joined = hashlib.sha256()
    for prompt in prompts:
        joined.update(prompt.digest + prompt.max_tokens.to_bytes(4, "little"))
        if prompt.forced:
            joined.update(prompt_digest(prompt.forced))
    return joined.hexdigest()


class Encoder:
    """Turns text and chats into token ids.

    Args:
        encode: token ids of plain text, special tokens included.
        encode_chat: token ids of a list of messages, the beginning of the answer included. None for a model
            without a chat template.
    """

    def __init__(
        self, encode: Callable[[str], list[int]], encode_chat: Callable[[list[dict[str, str]]], list[int]] | None
    ) -> None:
        self._encode = encode
        self._encode_chat = encode_chat

    @property
    def knows_chats(self) -> bool:
        """Whether the model has a chat template."""
        return self._encode_chat is not None

    def text(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self._encode(text)

    def continuation(self, text: str) -> list[int]:
        """Token ids of text that follows other text, without what the tokenizer puts before each."""
        return self.text(text)[len(common_start(self.text("a"), self.text("b"))) :]

    def question(self, text: str) -> list[int]:
        """Token ids of one user turn, or of plain text where the model knows no chats."""
        return self.text(text) if self._encode_chat is None else self._encode_chat([{"role": "user", "content": text}])

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a chat.

        Raises:
            ConfigError: the model has no chat template.
        """
        if self._encode_chat is None:
            raise ConfigError("--prompts: messages are given, but the model has no chat template; allowed: prompt")
        return self._encode_chat(messages)


def read_prompts(path: Path, encoder: Encoder, max_tokens: int) -> list[Prompt]:
    """Read a file of prompts, one JSON object in each line.

    An object has one of `prompt_ids` (token ids), `prompt` (text) and `messages` (a chat), and may have `max_tokens`
    and `group` (an integer; default: a group for each line). With `forced_ids` or `forced` (text), or a chat whose last
    message is the assistant's, the model is recorded along that text, up to `max_tokens` of it.

    Args:
        path: the file.
        encoder: for text and chats.
        max_tokens: where an object does not say.

    Raises:
        ConfigError: the file cannot be read, or a line is something else.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: {path} ({error}) is given; allowed is a file of UTF-8 text") from error
    prompts = []
    for number, line in json_lines(content):
        try:
            found = json.loads(line)
            ids, forced = _ids(found, encoder)
            limit, group = int(found.get("max_tokens", max_tokens)), int(found.get("group", number - 1))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"--prompts: {path}, line {number} ({type(error).__name__}: {error}): allowed is a JSON object with "
                "one of prompt_ids, prompt and messages, and at will max_tokens, group and one of forced_ids and forced"
            ) from None
        if not ids or limit < 1:
            raise ConfigError(f"--prompts: {path}, line {number}: at least one token to read and to write is needed")
        forced = forced[:limit]
        prompts.append(Prompt(ids, len(forced) or limit, group, forced=forced))
    if not prompts:
        raise ConfigError(f"--prompts: {path} is empty: allowed is at least one line")
    return prompts


def _ids(found: dict[str, Any], encoder: Encoder) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a prompt, and of the text that is to follow it."""
    forced = encoder.continuation(found["forced"]) if "forced" in found else found.get("forced_ids", ())
    if "prompt_ids" in found:
        ids = found["prompt_ids"]
    elif "messages" in found:
        messages = list(found["messages"])
        if messages[-1]["role"] == "assistant":
            forced = encoder.continuation(messages.pop()["content"])
        ids = encoder.chat(messages)
    else:
        ids = encoder.text(found["prompt"])
    return tuple(map(int, ids)), tuple(map(int, forced))
