"""Text and token ids of the reference language map onto each other exactly, chat template included."""

from pathlib import Path

import pytest

from flashmemory_vllm.evaluation import vocabulary as words
from flashmemory_vllm.evaluation.tasks import make_samples
from flashmemory_vllm.reference.tokenizer import build_tokenizer, write_tokenizer


def test_every_word_is_one_token_and_back() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.get_vocab_size() == words.NUM_WORDS
    ids = list(range(words.NUM_WORDS))
    text = words.decode(ids)
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_text_prompt_gets_its_bos() -> None:
    [sample] = make_samples("multikey", 1024, 1, seed=0)
    text = words.decode(sample.prompt_ids[1:].tolist())
    assert build_tokenizer().encode(text).ids == sample.prompt_ids.tolist()


def test_unknown_words_do_not_fail() -> None:
    assert build_tokenizer().encode("Paris ASK", add_special_tokens=False).ids == [words.UNK, words.ASK]


def test_chat_template_spells_what_was_trained(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path, max_tokens=65536)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    first, second = make_samples("multikey", 1024, 2, seed=0, questions_per_context=2, chat=True)
    turn = [{"role": "user", "content": words.decode(first.prompt_ids[2:-1].tolist())}]
    rendered = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert rendered == first.prompt_ids.tolist()
    turn += [
        {"role": "assistant", "content": words.decode(first.answer_ids[:-1].tolist())},
        {"role": "user", "content": words.decode(second.prompt_ids[-4:-1].tolist())},
    ]
    rendered = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    follow_up = [words.USER, *second.prompt_ids[-4:-1].tolist(), words.ASSISTANT]
    assert rendered == [*first.prompt_ids.tolist(), *first.answer_ids.tolist(), *follow_up]
    assert tokenizer.eos_token_id == words.END
