"""LongBench v2 from a local file, over the HTTP API of a running server; see `longbench_questions` for its rules."""

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from flashmemory_vllm.errors import ConfigError, FlashMemoryError
from flashmemory_vllm.evaluation.longbench_questions import (
    Answer,
    Question,
    Score,
    Tokenizer,
    cut_middle,
    load_questions,
    read_choice,
    score_answers,
)
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.evaluation.standard import (
    StandardRow,
    cell_key,
    load_rows,
    open_client,
    read_max_model_len,
    run_all,
    save_rows,
)
from flashmemory_vllm.files import write_text

if TYPE_CHECKING:
    from openai import OpenAI

SUITE = "longbench-v2"
# A chat template adds tokens to a prompt, and text that was cut may have more tokens than its parts had.
MARGIN_TOKENS = 256
REQUEST_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class LongBenchOptions:
    """How questions are asked. Temperature and length of the answer are by default those of the benchmark.

    Attributes:
        chat: ask through the chat API; otherwise through completions, for a model without a chat template.
        temperature: 0 compares two servers without the noise of sampling, which no seed takes away here.
        answer_tokens: most tokens of an answer.
        limit: questions to ask, from the first on. None: all.
        num_concurrent: requests in flight.
        provenance: where the rows come from. Default: this process.
    """

    chat: bool = True
    temperature: float = 0.1
    answer_tokens: int = 128
    limit: int | None = None
    num_concurrent: int = 8
    provenance: Provenance | None = None


def run_longbench(
    base_url: str,
    model: str,
    tokenizer: str,
    path: Path,
    out_dir: Path,
    max_tokens: int | None = None,
    options: LongBenchOptions | None = None,
) -> list[dict[str, Any]]:
    """Ask the questions of a file, showing progress; what `out_dir` has an answer to is not asked again.

    Args:
        base_url: a running server, with or without `/v1`. Its API key is read from `OPENAI_API_KEY`.
        model: name of the model at the server.
        tokenizer: the model's own, a folder or a Hugging Face id; it cuts prompts that are too long.
        path: JSON list, or one JSON object a line, with the fields of `Question`.
        out_dir: for `longbench-v2.json` with the rows and for the answers, which are written as they come. One for
            each server configuration: rows do not know what the server does.
        max_tokens: prompts with more lose their middle. Default: what leaves the server room for the answer.
        options: how questions are asked.

    Returns:
        A `StandardRow` as a dict for all questions, its task `all`, and one for each difficulty and length in the file.

    Raises:
        ConfigError: the file is not of this format, the server does not serve the model, or an argument is out of
            range.
        FlashMemoryError: the server failed; answers before that are kept.
    """
    options = options or LongBenchOptions()
    _check_options(options)
    questions = load_questions(path)[: options.limit]
    path_of_rows = out_dir / f"{SUITE}.json"
    stored = load_rows(path_of_rows)
    with open_client(base_url, REQUEST_SECONDS) as client:
        limit = _limit_tokens(max_tokens, read_max_model_len(client, model), options)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        run = _Run(client, model, tokenizer, limit, digest, options)
        if rows := [row for row in stored if run.made(row)]:
            return [asdict(row) for row in rows]
        answers = _ask(run, questions, out_dir / f"{SUITE}-{run.fingerprint}.jsonl")
    provenance = options.provenance or Provenance.collect(sys.argv)
    rows = [run.row(score, provenance) for score in score_answers(questions, answers)]
    save_rows(path_of_rows, [*stored, *rows])
    return [asdict(row) for row in rows]


@dataclass(frozen=True, slots=True)
class _Run:
    """What all questions of a call share, see `run_longbench`."""

    client: "OpenAI"
    model: str
    tokenizer: str
    max_tokens: int
    digest: str
    options: LongBenchOptions

    @property
    def settings(self) -> dict[str, Any]:
        """What tells rows apart."""
        names = ("chat", "temperature", "answer_tokens", "limit")
        return {"file_sha256": self.digest} | {name: getattr(self.options, name) for name in names}

    @property
    def fingerprint(self) -> str:
        """Names the file of the answers. Those of a run with a limit serve one without."""
        settings = {name: value for name, value in self.settings.items() if name != "limit"}
        key = cell_key(SUITE, "", self.max_tokens, self.model, self.tokenizer, settings)
        return hashlib.sha256(key.encode()).hexdigest()[:12]

    def made(self, row: StandardRow) -> bool:
        """Whether a row is one of this run's."""
        return row.cell == cell_key(SUITE, row.task, self.max_tokens, self.model, self.tokenizer, self.settings)

    def ask(self, question: Question, tokenizer: Tokenizer, lock: Lock) -> Answer:
        """One request; `lock` is held while the tokenizer is used, which threads must not share."""
        with lock:
            prompt, truncated = cut_middle(question.prompt, tokenizer, self.max_tokens)
        options = self.options
        common: dict[str, Any] = {
            "model": self.model,
            "max_tokens": options.answer_tokens,
            "temperature": options.temperature,
        }
        if options.chat:
            messages: Any = [{"role": "user", "content": prompt}]
            text = self.client.chat.completions.create(messages=messages, **common).choices[0].message.content or ""
        else:
            text = self.client.completions.create(prompt=prompt, **common).choices[0].text
        return Answer(question.id, read_choice(text), text, truncated)

    def row(self, score: Score, provenance: Provenance) -> StandardRow:
        """A score with what it was measured with."""
        return StandardRow(
            suite=SUITE,
            task=score.name or "all",
            tokens=self.max_tokens,
            questions=score.questions,
            accuracy=score.accuracy,
            stderr=math.sqrt(score.accuracy * (1 - score.accuracy) / score.questions),
            unparsable=score.unparsable,
            truncated=score.truncated,
            model=self.model,
            tokenizer=self.tokenizer,
            settings=self.settings,
            **asdict(provenance),
        )


def _check_options(options: LongBenchOptions) -> None:
    for name in ("answer_tokens", "limit", "num_concurrent"):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise ConfigError(f"{name} is {number}: allowed is 1 or more")
    if options.temperature < 0:
        raise ConfigError(f"temperature is {options.temperature}: allowed is 0 or more")


def _limit_tokens(max_tokens: int | None, max_model_len: int, options: LongBenchOptions) -> int:
    """Tokens of a prompt at most, checked against what the server takes."""
    largest = max_model_len - options.answer_tokens - MARGIN_TOKENS
    chosen = largest if max_tokens is None else max_tokens
    if not 2 <= chosen <= largest:
        raise ConfigError(
            f"max_tokens is {chosen}: allowed is 2 to {largest}, the server's max_model_len of {max_model_len} less "
            f"{options.answer_tokens} tokens for the answer and a margin of {MARGIN_TOKENS}"
        )
    return chosen


def _ask(run: _Run, questions: Sequence[Question], path: Path) -> list[Answer]:
    """Answers to all questions, those in the file first; new ones are added to it one by one."""
    from openai import OpenAIError

    answers = _load_answers(path)
    missing = [question for question in questions if question.id not in answers]
    if not missing:
        return [answers[question.id] for question in questions]
    tokenizer = _load_tokenizer(run.tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock()
    requests = [partial(run.ask, question, tokenizer, lock) for question in missing]
    with path.open("a", encoding="utf-8") as file, tqdm(total=len(missing), desc="LongBench", unit="q") as progress:
        try:
            for answer in run_all(requests, run.options.num_concurrent):
                answers[answer.id] = answer
                file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
                file.flush()
                progress.update()
        except OpenAIError as error:
            raise FlashMemoryError(f"{run.client.base_url} failed: {error}; {path} keeps the answers so far") from error
    return [answers[question.id] for question in questions]


def _load_answers(path: Path) -> dict[str, Answer]:
    """Answers of earlier runs by id; a last line that was not finished is cut off."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    answers = [Answer(**json.loads(line)) for line in whole.split("\n") if line]
    return {answer.id: answer for answer in answers}


def _load_tokenizer(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer is {name!r} ({error}): allowed is a folder or a Hugging Face id") from error
    return tokenizer
