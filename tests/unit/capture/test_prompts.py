"""Prompts from a file, from the reference tasks and generated in English."""

import json
import re
from pathlib import Path

import pytest

from flashmemory_vllm.capture.given_texts import given_prompts
from flashmemory_vllm.capture.prompts import Encoder, Prompt, digest_of_all, read_prompts
from flashmemory_vllm.capture.reference_prompts import (
    accuracy_prompts,
    reference_prompts,
    speaks_reference_language,
)
from flashmemory_vllm.capture.text_prompts import text_prompts
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation import vocabulary
from flashmemory_vllm.evaluation.tasks import LATE_COUNT, TASK_NAMES, make_samples
from flashmemory_vllm.reference.tokenizer import build_tokenizer


def encode(text: str) -> list[int]:
    """A token for each character, so that prompts can be read again."""
    return [0, *map(ord, text)]


def text_of(prompt: Prompt) -> str:
    return "".join(map(chr, prompt.ids[1:]))


PLAIN = Encoder(encode, None)
CHAT = Encoder(encode, lambda messages: encode("|".join(message["content"] for message in messages) + "?"))


def test_a_file_may_hold_ids_text_and_chats(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines: list[object] = [
        {"prompt_ids": [5, 6], "max_tokens": 7},
        {"prompt": "hi", "group": 9},
        {"messages": [{"role": "user", "content": "ho"}]},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert read_prompts(path, CHAT, 32) == [
        Prompt((5, 6), 7, 0),
        Prompt(tuple(encode("hi")), 32, 9),
        Prompt(tuple(encode("ho?")), 32, 4),
    ]


def test_a_line_ends_with_a_line_feed_and_with_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (prompt,) = read_prompts(path, PLAIN, 32)
    assert text_of(prompt) == "a\u2028b"


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x80"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"--prompts: .*prompts\.jsonl .* is given; allowed is a file of UTF-8 text"):
        read_prompts(path, PLAIN, 32)


def test_a_file_may_say_what_follows(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "ho"}, {"role": "assistant", "content": "hey"}]
    lines: list[object] = [
        {"prompt_ids": [5, 6], "forced_ids": [7, 8, 9], "max_tokens": 2},
        {"prompt": "hi", "forced": "there"},
        {"messages": chat},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    there, hey = tuple(map(ord, "there")), tuple(map(ord, "hey"))
    assert read_prompts(path, CHAT, 32) == [
        Prompt((5, 6), 2, 0, forced=(7, 8)),
        Prompt(tuple(encode("hi")), 5, 1, forced=there),
        Prompt(tuple(encode("ho?")), 3, 2, forced=hey),
    ]


def test_windows_of_texts_are_prompts_and_what_goes_on() -> None:
    texts = ["short", "abcdefghijklmnopqrstuvwxyz+", "0123456789"]
    prompts = given_prompts(texts, PLAIN, num_documents=9, num_tokens=7, num_forced=3)
    # Nine letters a window, behind the token that begins every text; every second prompt is half as long
    assert [text_of(prompt) for prompt in prompts] == ["abcdef", "no", "stuvwx", "45"]
    assert [prompt.group for prompt in prompts] == [1, 1, 1, 2]
    assert all(prompt.ids[0] == 0 and prompt.max_tokens == len(prompt.forced) == 3 for prompt in prompts)
    assert "".join(map(chr, prompts[0].forced)) == "ghi"
    assert len(given_prompts(texts, PLAIN, num_documents=2, num_tokens=7, num_forced=3)) == 2
    with pytest.raises(ConfigError, match="--texts: no document has 50 tokens"):
        given_prompts(texts, PLAIN, num_documents=2, num_tokens=40, num_forced=10)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("no json", "line 1 .*allowed is a JSON object"),
        ("[1, 2]", "line 1 .*allowed is a JSON object"),
        ('{"text": "hi"}', "line 1 .*allowed is a JSON object"),
        ('{"prompt": "hi", "max_tokens": "many"}', "line 1 .*allowed is a JSON object"),
        ('{"messages": []}', "line 1 .*allowed is a JSON object"),
        ('{"prompt_ids": []}', "line 1: at least one token"),
        ('{"prompt": "hi", "max_tokens": 0}', "line 1: at least one token"),
        ("", "is empty"),
    ],
)
def test_lines_that_are_no_prompt_are_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=said):
        read_prompts(path, CHAT, 32)


def test_chats_need_a_template(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "ho"}]}')
    with pytest.raises(ConfigError, match="no chat template"):
        read_prompts(path, PLAIN, 32)


def test_digests_tell_prompts_limits_and_order_apart() -> None:
    one, two = Prompt((1, 2), 8, 0), Prompt((3,), 8, 1)
    digests = [digest_of_all(prompts) for prompts in ([one, two], [two, one], [one, Prompt((3,), 9, 1)], [one])]
    assert len(set(digests)) == len(digests)
    assert one.digest == Prompt((1, 2), 5, 7).digest != two.digest
    along = [digest_of_all([Prompt((1, 2), 1, 0, forced=forced)]) for forced in ((), (5,), (6,))]
    assert len(set(along)) == 3


def test_reference_prompts_cover_tasks_and_lengths_without_repeating() -> None:
    prompts = reference_prompts(20, 1600, seed=1, max_tokens=512)
    assert prompts == reference_prompts(20, 1600, seed=1, max_tokens=512)
    assert len({prompt.digest for prompt in prompts}) == len({prompt.group for prompt in prompts}) == 20
    assert {len(prompt.ids) for prompt in prompts} == {600, 800, 1600}
    late = prompts[TASK_NAMES.index("late")]
    assert (late.answer, late.max_tokens) == ((LATE_COUNT, LATE_COUNT + 4), LATE_COUNT + 6)
    assert reference_prompts(5, 600, seed=1, max_tokens=3)[0].max_tokens == 3


def test_too_short_reference_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="--tokens is 599"):
        reference_prompts(1, 599, seed=0, max_tokens=8)


def test_accuracy_prompts_are_those_of_the_accuracy_command() -> None:
    from flashmemory_vllm.evaluation.accuracy import SEED
    from flashmemory_vllm.evaluation.questions import max_questions

    asked = {prompt.ids: prompt for prompt in accuracy_prompts(6, 1024)}
    for task in TASK_NAMES:
        shared = min(20, max_questions(task, 1024))
        for sample in make_samples(task, 1024, 6, SEED, questions_per_context=shared):
            assert asked[tuple(sample.prompt_ids.tolist())].max_tokens == len(sample.answer_ids)
    assert len({prompt.group for prompt in asked.values()}) < len(asked)


def test_the_reference_language_is_known_by_its_tokenizer() -> None:
    tokenizer = build_tokenizer()
    assert speaks_reference_language(lambda text: list(tokenizer.encode(text).ids))
    assert not speaks_reference_language(encode)
    assert tokenizer.encode("").ids[0] == vocabulary.BOS


def test_generated_texts_have_their_lengths_and_repeat_with_the_seed() -> None:
    prompts = text_prompts(PLAIN, 12, 6000, 99, seed=4)
    assert prompts == text_prompts(PLAIN, 12, 6000, 99, seed=4)
    assert len({prompt.digest for prompt in prompts}) == 12
    assert prompts[0] != text_prompts(PLAIN, 1, 6000, 99, seed=5)[0]
    # No more than a line off
    assert all(6000 <= len(prompt.ids) < 6120 for prompt in prompts[8:])
    assert all(len(prompt.ids) < 3120 for prompt in prompts[:8])
    assert {prompt.max_tokens for prompt in prompts} == {99}


def test_generated_questions_can_be_answered() -> None:
    needle, hops, records, recall = map(text_of, text_prompts(PLAIN, 4, 20000, 99, seed=0))
    thing = re.search(r"What is the secret number of the (.+)\? Answer", needle)
    assert thing is not None
    assert len(re.findall(rf"The secret number of the {thing[1]} is \d{{6}}\.", needle)) == 1
    person = re.search(r"person that (.+) works for\?", hops)
    assert person is not None
    bosses = re.findall(rf"{person[1]} works for (.+)\.", hops)
    assert len(bosses) == 1
    assert len(re.findall(rf"The office of {bosses[0]} is room \d+\.", hops)) == 1
    asked = re.search(r"Write down the records ([\d, ]+), one", records)
    assert asked is not None
    for key in asked[1].split(", "):
        assert len(re.findall(rf"Record {key}: .+\.", records)) == 1
    assert len(re.findall(r"Delivery \d+ brought the .+\.", recall)) == 24


def test_generated_questions_go_through_the_chat_template() -> None:
    assert text_of(text_prompts(CHAT, 1, 3000, 9, seed=0)[0]).endswith("?")
