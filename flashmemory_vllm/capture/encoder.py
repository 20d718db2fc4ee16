"""The tokenizer of a model, as prompts are made with it."""

from typing import Any

from flashmemory_vllm.capture.prompts import Encoder
from flashmemory_vllm.errors import ConfigError


def load_encoder(model: str) -> tuple[Encoder, tuple[int, ...]]:
    """The model's tokenizer, and the token that ends an answer.

    Args:
        model: folder or Hugging Face id.

    Raises:
        ConfigError: there is no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer is {model!r} ({error}): allowed is a folder or a Hugging Face id") from error

    def encode_chat(messages: list[dict[str, str]]) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    end = tokenizer.eos_token_id
    encoder = Encoder(tokenizer.encode, None if tokenizer.chat_template is None else encode_chat)
    return encoder, () if end is None else (int(end),)
