"""RULER through lm-evaluation-harness: its generators and its scores, over the HTTP API of a running server.

Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", 2024
(https://arxiv.org/abs/2404.06654).

Every cell, one task at one length, is a process of its own. The harness draws its samples from random generators
that live as long as a process, so this way a cell asks the same questions whatever else is measured: a dense and a
sparse server are compared on the same prompts, and a resumed run goes on as the first one would have.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from flashmemory_vllm.errors import ConfigError, FlashMemoryError
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.evaluation.standard import (
    INSTALL_HINT,
    StandardRow,
    api_url,
    cell_key,
    load_rows,
    open_client,
    read_max_model_len,
    run_all,
    save_rows,
)
from flashmemory_vllm.files import write_text
from flashmemory_vllm.processes.guarded import GuardedProcess

SUITE = "ruler"
# Tasks whose text the harness makes up itself.
OFFLINE_TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
_ESSAYS = "the data set baber/paul_graham_essays of Hugging Face and the resource punkt_tab of NLTK"
# What the harness fetches for each of the others: essays once, into the caches of both, the rest on every run.
DOWNLOADS = {
    "niah_single_2": _ESSAYS,
    "niah_single_3": _ESSAYS,
    "niah_multikey_1": _ESSAYS,
    "niah_multivalue": _ESSAYS,
    "niah_multiquery": _ESSAYS,
    "ruler_qa_squad": "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",
    "ruler_qa_hotpot": "hotpot_dev_distractor_v1.json from https://huggingface.co/datasets/namlh2004/hotpotqa",
}
# With less room some generators of the harness find no sample that fits and try for ever.
MIN_TOKENS = 2048
# The harness counts neither the beginning of the answer that ends its prompts nor, for `ruler_fwe`, the answer.
MARGIN_TOKENS = 256
REQUEST_SECONDS = 3600
LOG_LINES = 30

_HARNESS = (sys.executable, "-m", "lm_eval")
_NEEDED_MODULES = ("lm_eval", "wonderwords", "nltk", "scipy", "tenacity")


@dataclass(frozen=True, slots=True)
class RulerOptions:
    """How the harness asks.

    Attributes:
        chat_template: put the questions into the tokenizer's chat template, as instruct models expect.
        num_concurrent: requests in flight for each cell.
        num_processes: cells at once. Making the samples takes one core for each.
        provenance: where the rows come from. Default: this process.
    """

    chat_template: bool = False
    num_concurrent: int = 8
    num_processes: int = 1
    provenance: Provenance | None = None


def run_ruler(
    base_url: str,
    model: str,
    tokenizer: str,
    tasks: Sequence[str],
    lengths: Sequence[int],
    limit: int | None,
    out_dir: Path,
    options: RulerOptions | None = None,
) -> list[dict[str, Any]]:
    """Measure each task at each length, showing progress; cells that have a row in `out_dir` are kept.

    Args:
        base_url: a running server, with or without `/v1`. Its API key is read from `OPENAI_API_KEY`.
        model: name of the model at the server.
        tokenizer: the model's own, a folder or a Hugging Face id. The harness loads it with `trust_remote_code`.
        tasks: names of `OFFLINE_TASKS` or `DOWNLOADS`.
        lengths: tokens of prompt and answer, at least `MIN_TOKENS`; not only those of RULER itself.
        limit: samples of each cell, from the first on. None: the 500 that the harness makes.
        out_dir: for `ruler.json` with the rows, and for a folder of each cell with the harness's settings, log,
            results and samples. One for each server configuration: rows do not know what the server does.
        options: how the harness asks.

    Returns:
        A `StandardRow` as a dict for each cell, by length and task.

    Raises:
        ConfigError: the harness is not installed, the server does not serve the model, or an argument is out of
            range.
        FlashMemoryError: the harness failed; the message has the end of its log.
    """
    options = options or RulerOptions()
    options = replace(options, provenance=options.provenance or Provenance.collect(sys.argv))
    _check_arguments(tasks, lengths, limit, options)
    check_harness()
    with open_client(base_url, REQUEST_SECONDS) as client:
        _check_lengths(lengths, read_max_model_len(client, model))
    folder = Path(tokenizer).expanduser()
    cells = [
        _Cell(api_url(base_url), model, str(folder.resolve()) if folder.is_dir() else tokenizer, task, tokens, limit)
        for tokens in sorted(set(lengths))
        for task in dict.fromkeys(tasks)
    ]
    path = out_dir / f"{SUITE}.json"
    rows = {row.cell: row for row in load_rows(path)}
    for row in _measure([cell for cell in cells if cell.key(options) not in rows], out_dir / SUITE, options):
        rows[row.cell] = row
        save_rows(path, list(rows.values()))
    return [asdict(rows[cell.key(options)]) for cell in cells]


@dataclass(frozen=True, slots=True)
class _Cell:
    """One run of the harness, see `run_ruler`."""

    api: str
    model: str
    tokenizer: str
    task: str
    tokens: int
    limit: int | None

    def settings(self, options: RulerOptions) -> dict[str, Any]:
        return {"limit": self.limit, "chat_template": options.chat_template}

    def key(self, options: RulerOptions) -> str:
        return cell_key(SUITE, self.task, self.tokens, self.model, self.tokenizer, self.settings(options))

    def config(self, folder: Path, options: RulerOptions) -> dict[str, Any]:
        """What `lm_eval run --config` reads."""
        return {
            "model": "local-completions",
            "model_args": {
                "model": self.model,
                "base_url": f"{self.api}/completions",
                "tokenizer": self.tokenizer,
                "tokenizer_backend": "huggingface",
                "tokenized_requests": True,
                # A chat template begins with the token itself
                "add_bos_token": not options.chat_template,
                # The harness cuts longer prompts silently: none is
                "max_length": self.tokens + MARGIN_TOKENS,
                "num_concurrent": options.num_concurrent,
                "timeout": REQUEST_SECONDS,
            },
            "apply_chat_template": options.chat_template,
            "tasks": [self.task],
            "metadata": {"max_seq_lengths": [self.tokens]},
            "limit": self.limit,
            "log_samples": True,
            "output_path": str(folder / "results.json"),
        }


def _check_arguments(tasks: Sequence[str], lengths: Sequence[int], limit: int | None, options: RulerOptions) -> None:
    unknown = [task for task in tasks if task not in {*OFFLINE_TASKS, *DOWNLOADS}]
    if unknown or not tasks:
        raise ConfigError(
            f"tasks are {', '.join(tasks) or 'none'}: allowed without a download are {', '.join(OFFLINE_TASKS)}, "
            f"with one {', '.join(DOWNLOADS)}"
        )
    if not lengths or min(lengths) < MIN_TOKENS:
        raise ConfigError(f"lengths are {list(lengths)}: allowed are {MIN_TOKENS} tokens or more")
    numbers = {"limit": limit, "num_concurrent": options.num_concurrent, "num_processes": options.num_processes}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ConfigError(f"{name} is {number}: allowed is 1 or more")


def check_harness() -> None:
    """See that the harness is installed.

    Raises:
        ConfigError: it is not; the message says what installs it.
    """
    missing = [name for name in _NEEDED_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"RULER needs lm-evaluation-harness, {', '.join(missing)} not installed: {INSTALL_HINT}")


def _check_lengths(lengths: Sequence[int], max_model_len: int) -> None:
    largest = max_model_len - MARGIN_TOKENS
    if max(lengths) > largest:
        raise ConfigError(
            f"lengths are {list(lengths)}: allowed are up to {largest}, the server's max_model_len of {max_model_len} "
            f"less {MARGIN_TOKENS} tokens that the harness does not count"
        )


def _measure(cells: Sequence[_Cell], root: Path, options: RulerOptions) -> Iterator[StandardRow]:
    """Rows as they are finished, showing progress."""
    runs = [partial(_run_cell, cell, root, options) for cell in cells]
    with tqdm(total=len(cells), desc="RULER", unit="cell", disable=not cells) as progress:
        for row in run_all(runs, options.num_processes):
            progress.set_postfix_str(f"{row.task} {row.tokens:,}: {row.accuracy:.3f}")
            progress.update()
            yield row


def _run_cell(cell: _Cell, root: Path, options: RulerOptions) -> StandardRow:
    folder = (root / f"{cell.task}-{cell.tokens}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    write_text(config, yaml.safe_dump(cell.config(folder, options), sort_keys=False))
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as output:
        command = [*_HARNESS, "run", "--config", str(config)]
        with GuardedProcess(command, output, _environment(cell, folder)) as harness:
            code = harness.wait()
    if code:
        raise FlashMemoryError(_failure(cell, code, log))
    # The harness puts the time into the name
    results = json.loads(max(folder.glob("results_*.json")).read_text(encoding="utf-8"))
    return _read_row(cell, results, options)


def _environment(cell: _Cell, folder: Path) -> dict[str, str]:
    """Keeps the harness off the network where the task needs nothing from there.

    On import it looks for NLTK's sentence splitter and otherwise fetches it. Only tasks with essays use it: for the
    others a folder of that name is enough.
    """
    if cell.task in DOWNLOADS:
        return dict(os.environ)
    nltk_data = folder / "nltk_data"
    (nltk_data / "tokenizers" / "punkt_tab").mkdir(parents=True, exist_ok=True)
    paths = [str(nltk_data), os.environ.get("NLTK_DATA", "")]
    return dict(os.environ) | {"NLTK_DATA": os.pathsep.join(path for path in paths if path)}


def _failure(cell: _Cell, code: int, log: Path) -> str:
    end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
    needs = f"; it needs {DOWNLOADS[cell.task]}" if cell.task in DOWNLOADS else ""
    return f"lm_eval ended with code {code} for {cell.task} at {cell.tokens:,} tokens{needs}; {log} ends with\n{end}"


def _read_row(cell: _Cell, results: dict[str, Any], options: RulerOptions) -> StandardRow:
    scores = results["results"][cell.task]
    stderr = scores.get(f"{cell.tokens}_stderr,none")
    assert options.provenance is not None
    provenance = asdict(options.provenance)
    provenance["versions"] |= {"lm-eval": results["lm_eval_version"]}
    return StandardRow(
        suite=SUITE,
        task=cell.task,
        tokens=cell.tokens,
        questions=results["n-samples"][cell.task]["effective"],
        accuracy=scores[f"{cell.tokens},none"],
        stderr=stderr if isinstance(stderr, float) else None,
        model=cell.model,
        tokenizer=cell.tokenizer,
        settings=cell.settings(options),
        **provenance,
    )
