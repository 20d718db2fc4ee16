"""The tokenizer of the reference language: one whitespace-separated word is one token, both ways exactly."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from flashmemory_vllm.evaluation import vocabulary as words
from flashmemory_vllm.files import write_json

CHAT_TEMPLATE = (
    "<bos>"
    "{% for message in messages %}"
    " <{{ message.role }}> {{ message.content }}"
    "{% if message.role == 'assistant' %} <end>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def build_tokenizer() -> Tokenizer:
    """Tokenizer of the 2,048 words; a prompt gets `<bos>` in front unless special tokens are switched off."""
    tokenizer = Tokenizer(
        WordLevel({word: index for index, word in enumerate(words.WORDS)}, unk_token=words.WORDS[words.UNK])
    )
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words.SPECIAL_WORDS])
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", words.BOS)])
    return tokenizer


def write_tokenizer(folder: Path, max_tokens: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, chat template included, into `folder`."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<end>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings, indent=2)
