"""The accuracy run asks each missing cell once, believes only whole answers, and reports what it measured."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation import vocabulary as words
from flashmemory_vllm.evaluation.accuracy import SEED, AccuracyPlan, AccuracyRun, max_questions, settings_of
from flashmemory_vllm.evaluation.accuracy_rows import (
    AccuracyRow,
    Setting,
    format_tables,
    load_rows,
    save_rows,
)
from flashmemory_vllm.evaluation.contexts import VALUE_WORDS
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.evaluation.tasks import ANSWER_LENS, TaskName, make_samples

PROVENANCE = Provenance("flashmemory accuracy", "abc", "a device", {"torch": "2"})
PLAN = AccuracyPlan(
    settings_of(("streaming", "full", "exact"), tau=16, ratio=0.125, groups=1),
    tasks=("multikey", "tracking"),
    lengths=(600, 1200),
    num_questions=12,
    questions_per_context=4,
)
NUM_CELLS = 3 * 2 * 2


def read_answer(prompt: Sequence[int]) -> list[int]:
    """Answer `ASK k k` or `TRACE a a` by looking it up in the prompt, as dense attention would."""
    ids = list(prompt)
    asked, key = ids[-3], ids[-2:]
    if asked == words.TRACE:
        place = next(i for i in range(len(ids)) if ids[i : i + 3] == [words.LET, *key])
        target = ids[place + 3 : place + 5]
        return [*target, *read_answer([*ids[:-3], words.ASK, *target])]
    assert asked == words.ASK
    place = next(i for i in range(len(ids)) if ids[i : i + 3] == [words.NEEDLE, *key])
    return [*ids[place + 3 : place + 3 + VALUE_WORDS], words.END]


class ReadingGenerator:
    """Reads every answer from its prompt; gets the last value word wrong wherever `fails` says so."""

    def __init__(self, fails: Mapping[str, int] | None = None) -> None:
        self.fails = fails or {}
        self.options: dict[str, object] = {}
        self.asked: list[tuple[object, int]] = []
        self.reconfigured: list[dict[str, object]] = []
        self._counters = dict.fromkeys(
            ("decode_resident_blocks_total", "decode_context_blocks_total", "recalled_blocks_total"), 0.0
        )

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int] | int) -> list[list[int]]:
        assert not isinstance(max_tokens, int)
        self.asked.append((self.options["selector"], len(prompts)))
        ratio = self.options["resident_ratio"]
        assert isinstance(ratio, float)
        answers = []
        every = self.fails.get(str(self.options["selector"]), 0)
        for index, (prompt, limit) in enumerate(zip(prompts, max_tokens, strict=True)):
            answer = read_answer(prompt)
            if every and index % every == 0:
                answer[-2] ^= 1
            answers.append(answer[:limit])
            self._counters["decode_context_blocks_total"] += 80
            self._counters["decode_resident_blocks_total"] += 80 * ratio
            self._counters["recalled_blocks_total"] += 3
        return answers

    def reconfigure(self, options: Mapping[str, object]) -> None:
        self.options = dict(options)
        self.reconfigured.append(self.options)

    def counters(self) -> dict[str, float]:
        return dict(self._counters)


def run(generator: ReadingGenerator, path: Path, plan: AccuracyPlan = PLAN) -> list[AccuracyRow]:
    return AccuracyRun(generator, plan, "toy", 16, PROVENANCE, path).run()


def row_of(rows: Sequence[AccuracyRow], selector: str, task: TaskName, tokens: int) -> AccuracyRow:
    return next(row for row in rows if (row.selector, row.task, row.tokens) == (selector, task, tokens))


def test_every_cell_is_measured_once_and_told_with_its_conditions(tmp_path: Path) -> None:
    generator = ReadingGenerator({"streaming": 1, "exact": 4})
    rows = run(generator, tmp_path / "rows.json")
    assert len(rows) == len({(row.setting, row.questions_key) for row in rows}) == NUM_CELLS
    assert {row.accuracy for row in rows if row.selector == "full"} == {1.0}
    assert {row.accuracy for row in rows if row.selector == "streaming"} == {0.0}
    assert {row.accuracy for row in rows if row.selector == "exact"} == {0.75}
    assert {row.dense_accuracy for row in rows} == {1.0}
    exact = row_of(rows, "exact", "tracking", 1200)
    assert (exact.questions, exact.ratio, exact.resident_share, exact.recalled_blocks) == (
        12,
        0.125,
        0.125,
        36,
    )
    assert (exact.commit, exact.gpu, exact.versions) == ("abc", "a device", {"torch": "2"})
    assert load_rows(tmp_path / "rows.json") == rows


def test_the_dense_baseline_comes_first_and_each_selector_is_set_up_once(tmp_path: Path) -> None:
    generator = ReadingGenerator()
    run(generator, tmp_path / "rows.json")
    assert [options["selector"] for options in generator.reconfigured] == ["full", "streaming", "exact"]
    assert [options["resident_ratio"] for options in generator.reconfigured] == [1.0, 0.125, 0.125]
    assert generator.asked == [(name, 12) for name in ("full", "streaming", "exact") for _ in range(4)]


def test_a_finished_cell_is_not_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = run(ReadingGenerator({"exact": 4}), path)
    save_rows(path, [row for row in rows if row is not row_of(rows, "exact", "multikey", 600)])
    second = ReadingGenerator({"exact": 4})
    again = run(second, path)
    assert second.asked == [("exact", 12)]
    assert sorted(again, key=repr) == sorted(rows, key=repr)
    third = ReadingGenerator()
    run(third, path)
    assert not third.asked
    assert not third.reconfigured


def test_what_was_measured_survives_a_crash(tmp_path: Path) -> None:
    class Breaking(ReadingGenerator):
        def generate(self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int] | int) -> list[list[int]]:
            if len(self.asked) == 5:
                raise KeyboardInterrupt
            return super().generate(prompts, max_tokens)

    path = tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        run(Breaking(), path)
    assert len(load_rows(path)) == 5
    rest = ReadingGenerator()
    assert len(run(rest, path)) == NUM_CELLS
    assert len(rest.asked) == NUM_CELLS - 5


@pytest.mark.parametrize(
    "setting",
    [
        Setting("exact", 64, 0.125, 1),
        Setting("exact", 16, 0.25, 1),
        Setting("exact", 16, 0.125, 2),
        Setting("exact", 16, 0.125, 1, (2, 3)),
    ],
)
def test_another_setting_is_another_cell(tmp_path: Path, setting: Setting) -> None:
    path = tmp_path / "rows.json"
    run(ReadingGenerator(), path)
    generator = ReadingGenerator()
    assert len(run(generator, path, replace(PLAN, settings=(setting,)))) == NUM_CELLS + 4
    assert len(generator.asked) == 4
    again = ReadingGenerator()
    run(again, path, replace(PLAN, settings=(setting,)))
    assert not again.asked


def test_a_dense_baseline_that_comes_late_reaches_the_rows_before_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    sparse = replace(PLAN, settings=tuple(one for one in PLAN.settings if one.selector == "exact"))
    assert {row.dense_accuracy for row in run(ReadingGenerator(), path, sparse)} == {None}
    assert {row.dense_accuracy for row in run(ReadingGenerator({"full": 2}), path)} == {0.5}


def test_a_right_beginning_is_no_right_answer(tmp_path: Path) -> None:
    class Babbling(ReadingGenerator):
        def generate(self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int] | int) -> list[list[int]]:
            return [[*answer[:-1], words.STOP] for answer in super().generate(prompts, max_tokens)]

    assert {row.accuracy for row in run(Babbling(), tmp_path / "rows.json")} == {0.0}


def test_tables_hold_every_figure_and_leave_out_means_of_unfinished_lengths(tmp_path: Path) -> None:
    rows = run(ReadingGenerator({"exact": 4}), tmp_path / "rows.json")
    rows.remove(row_of(rows, "exact", "tracking", 1200))
    assert format_tables(rows) == (
        "### multikey\n\n"
        "| selector | ratio | tau | groups | anchors | 600 | 1,200 | resident |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| full | 1 | 16 | 1 | default | 1.000 | 1.000 | 100.0% |\n"
        "| streaming | 0.125 | 16 | 1 | default | 1.000 | 1.000 | 12.5% |\n"
        "| exact | 0.125 | 16 | 1 | default | 0.750 | 0.750 | 12.5% |\n\n"
        "### tracking\n\n"
        "| selector | ratio | tau | groups | anchors | 600 | 1,200 | resident |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| full | 1 | 16 | 1 | default | 1.000 | 1.000 | 100.0% |\n"
        "| streaming | 0.125 | 16 | 1 | default | 1.000 | 1.000 | 12.5% |\n"
        "| exact | 0.125 | 16 | 1 | default | 0.750 |  | 12.5% |\n\n"
        "### mean over the tasks\n\n"
        "| selector | ratio | tau | groups | anchors | 600 | 1,200 | resident |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| full | 1 | 16 | 1 | default | 1.000 | 1.000 | 100.0% |\n"
        "| streaming | 0.125 | 16 | 1 | default | 1.000 | 1.000 | 12.5% |\n"
        "| exact | 0.125 | 16 | 1 | default | 0.750 |  | 12.5% |"
    )


@pytest.mark.parametrize("content", ["{}x", '[{"task": "multikey"}]', "[1]"])
def test_a_foreign_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="resident_share"):
        load_rows(path)


@pytest.mark.parametrize("task", list(ANSWER_LENS))
@pytest.mark.parametrize("tokens", [700, 4096])
def test_a_context_holds_as_many_questions_as_promised(task: TaskName, tokens: int) -> None:
    most = max_questions(task, tokens)
    make_samples(task, tokens, most, seed=0, questions_per_context=most)
    with pytest.raises(ConfigError):
        make_samples(task, tokens, most + 1, seed=0, questions_per_context=most + 1)


def test_the_questions_are_those_of_the_reference_models_own_evaluation() -> None:
    from flashmemory_vllm.reference.evaluate import EVALUATION_SEED

    assert SEED == EVALUATION_SEED
