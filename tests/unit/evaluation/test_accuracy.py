"""The accuracy run asks each missing cell once, believes only whole answers, and reports what it measured."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from flashmemory_vllm.evaluation import vocabulary as words
from flashmemory_vllm.evaluation.accuracy import (
    FALLBACKS_COUNTER,
    REFUSED_FALLBACKS_COUNTER,
    SEED,
    AccuracyRun,
    Cell,
    Conditions,
    note_unaffordable,
)
from flashmemory_vllm.evaluation.accuracy_plan import CellGroup
from flashmemory_vllm.evaluation.accuracy_rows import AccuracyRow, Setting, load_rows, save_rows
from flashmemory_vllm.evaluation.contexts import VALUE_WORDS
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.evaluation.tasks import TaskName

PROVENANCE = Provenance("flashmemory accuracy", "abc", "a device", {"torch": "2"})
CONDITIONS = Conditions("toy", 16, questions_per_context=4)
GROUP = CellGroup(
    selectors=["streaming", "full", "exact"],
    tasks=["multikey", "tracking"],
    tokens=[600, 1200],
    ratios=[0.125],
    batches=[64],
    questions=12,
)
CELLS = list(GROUP.cells(None, lambda setting: setting.ratio))
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


def run(
    generator: ReadingGenerator, path: Path, cells: Sequence[Cell] = CELLS, deadline: float | None = None
) -> list[AccuracyRow]:
    return AccuracyRun(generator, CONDITIONS, PROVENANCE, path, deadline).run(cells)


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
    "cell",
    [
        replace(CELLS[-1], setting=setting)
        for setting in (
            Setting("exact", 64, 0.125, 1),
            Setting("exact", 16, 0.25, 1),
            Setting("exact", 16, 0.125, 2),
            Setting("exact", 16, 0.125, 1, (2, 3)),
            Setting("exact", 16, 0.125, 1, score_threshold=0.1),
        )
    ]
    + [replace(CELLS[-1], batch=5), replace(CELLS[-1], questions=11)],
    ids=["tau", "ratio", "groups", "anchors", "threshold", "batch", "questions"],
)
def test_another_condition_is_another_cell(tmp_path: Path, cell: Cell) -> None:
    path = tmp_path / "rows.json"
    run(ReadingGenerator(), path)
    generator = ReadingGenerator()
    assert len(run(generator, path, [cell])) == NUM_CELLS + 1
    assert sum(count for _, count in generator.asked) == cell.questions
    again = ReadingGenerator()
    run(again, path, [cell])
    assert not again.asked


def test_a_row_from_before_batches_were_told_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    save_rows(path, [replace(row, batch=None) for row in run(ReadingGenerator(), path)])
    again = ReadingGenerator()
    assert {row.batch for row in run(again, path)} == {None}
    assert not again.asked


def test_no_more_are_asked_at_once_than_the_batch(tmp_path: Path) -> None:
    generator = ReadingGenerator({"exact": 2})
    (row,) = run(generator, tmp_path / "rows.json", [replace(CELLS[-1], batch=5)])
    assert generator.asked == [("exact", 5), ("exact", 5), ("exact", 2)]
    # Every second one of each wave is wrong, its first one among them
    assert (row.accuracy, row.batch, row.recalled_blocks) == ((2 + 2 + 1) / 12, 5, 36)


def test_no_cell_is_begun_after_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = ReadingGenerator()
    monkeypatch.setattr("time.monotonic", lambda: 10.0 * len(generator.asked))
    rows = run(generator, tmp_path / "rows.json", deadline=45.0)
    assert len(rows) == len(generator.asked) == 5
    assert len(generator.reconfigured) == 2
    rest = ReadingGenerator()
    run(rest, tmp_path / "rows.json", deadline=None)
    assert len(rest.asked) == NUM_CELLS - 5


def test_dense_accuracy_is_that_of_the_same_batch_if_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    cells = [cell for cell in CELLS if (cell.task, cell.tokens) == ("multikey", 600)]
    run(ReadingGenerator({"full": 2}), path, cells)
    run(ReadingGenerator(), path, [replace(cells[0], batch=3)])
    rows = run(ReadingGenerator(), path, [replace(cells[-1], batch=batch) for batch in (2, 3)])
    assert [(row.batch, row.dense_accuracy) for row in rows if row.selector == "exact"] == [
        (64, 0.5),
        (2, 1.0),
        (3, 1.0),
    ]


def test_a_dense_baseline_that_comes_late_reaches_the_rows_before_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    sparse = [cell for cell in CELLS if cell.setting.selector == "exact"]
    assert {row.dense_accuracy for row in run(ReadingGenerator(), path, sparse)} == {None}
    assert {row.dense_accuracy for row in run(ReadingGenerator({"full": 2}), path)} == {0.5}


def test_a_right_beginning_is_no_right_answer(tmp_path: Path) -> None:
    class Babbling(ReadingGenerator):
        def generate(self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int] | int) -> list[list[int]]:
            return [[*answer[:-1], words.STOP] for answer in super().generate(prompts, max_tokens)]

    assert {row.accuracy for row in run(Babbling(), tmp_path / "rows.json")} == {0.0}


def test_a_row_tells_the_device_bytes_of_a_prompt_with_the_index_of_all_its_blocks(tmp_path: Path) -> None:
    class Telling(ReadingGenerator):
        def counters(self) -> dict[str, float]:
            return super().counters() | {"index_bytes_per_block": 100.0}

    conditions = replace(CONDITIONS, block_bytes=1000)
    rows = AccuracyRun(Telling(), conditions, PROVENANCE, tmp_path / "rows.json").run(CELLS)
    # 600 tokens begin a 38th block of 16, an eighth of which is resident
    assert row_of(rows, "exact", "multikey", 600).device_bytes == 38 * (125 + 100)
    assert row_of(rows, "full", "multikey", 600).device_bytes == 38 * (1000 + 100)
    assert {row.device_bytes for row in run(Telling(), tmp_path / "other.json")} == {None}


def test_a_row_counts_fallbacks_where_there_can_be_any(tmp_path: Path) -> None:
    class Falling(ReadingGenerator):
        def counters(self) -> dict[str, float]:
            asked = sum(count for _, count in self.asked)
            return super().counters() | {FALLBACKS_COUNTER: 2.0 * asked, REFUSED_FALLBACKS_COUNTER: 3.0 * asked}

    setting = Setting("exact", 16, 0.125, 1, score_threshold=0.1)
    falling = replace(CELLS[-1], setting=replace(setting, fallback_share=0.3))
    cells = [CELLS[-1], replace(CELLS[-1], setting=setting), falling]
    rows = run(Falling(), tmp_path / "rows.json", cells)
    assert [(row.fallback_share, row.fallbacks, row.refused_fallbacks) for row in rows] == [
        (None, None, None),
        (None, None, None),
        (0.3, 24, 36),
    ]


def test_a_share_that_the_index_takes_alone_gets_a_row_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    dense = run(ReadingGenerator({"full": 2}), path, CELLS[:1])
    # Of 38 blocks a third are 12, but a tenth are 3, and the sink alone has 4
    settings = [Setting("exact", 16, ratio, 1, device_share=0.5) for ratio in (-0.1, 0.1, 1 / 3)]
    cells = [replace(CELLS[0], setting=setting) for setting in settings]
    assert note_unaffordable(cells, CONDITIONS, lambda: PROVENANCE, path) == cells[2:]
    rows = load_rows(path)[len(dense) :]
    assert [(row.setting, row.accuracy, row.dense_accuracy, row.commit) for row in rows] == [
        (setting, None, 0.5, "abc") for setting in settings[:2]
    ]
    assert rows[0].not_measured is not None
    assert "index keys take 60.0%, which leaves 0 of 38 blocks; the smallest resident set has 6" in rows[0].not_measured
    assert CONDITIONS.missing(cells, load_rows(path)) == cells[2:]


def test_nothing_is_written_where_all_can_be_measured(tmp_path: Path) -> None:
    def origin() -> Provenance:
        raise AssertionError

    assert note_unaffordable(CELLS, CONDITIONS, origin, tmp_path / "rows.json") == CELLS
    assert not (tmp_path / "rows.json").exists()


def test_the_questions_are_those_of_the_reference_models_own_evaluation() -> None:
    from flashmemory_vllm.reference.evaluate import EVALUATION_SEED

    assert SEED == EVALUATION_SEED
