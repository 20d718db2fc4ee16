"""choose_sets: against a plain loop, ties, what is unknown or no number, and lists that are too short."""

import math

import pytest
import torch
from flashmemory_kernels.choose_sets import COMES, GOES, LIST_HEADER, WORTH, ChoicePolicy, choose_sets
from flashmemory_kernels.choose_sets.cases import CASES, POISON, ChoiceCase, ChoiceInputs, make_inputs
from flashmemory_kernels.common.due_rows import Due, make_rows

Chosen = tuple[set[int], list[int], list[int], int]


def value_of(given: ChoiceInputs, row: list[int], group: int, block: int) -> float:
    """What a block is worth without its bonus."""

    def own(at: int) -> float:
        if not 0 <= at < row[Due.NUM_BLOCKS]:
            return 0.0
        of_channels = given.memory[:, group, row[Due.PLACE], at].tolist()
        parts = [
            0.0 if math.isnan(part) else part * weight
            for part, weight in zip(of_channels, given.weights.tolist(), strict=True)
        ]
        return sum(parts) if given.policy.combine == "sum" else max(parts)

    return math.inf if block >= row[Due.NUM_BLOCKS] else max(own(block), given.policy.successor * own(block - 1))


def choose_one(given: ChoiceInputs, row: list[int], group: int, held: set[int]) -> Chosen:
    """The new set, who comes, who goes and how many blocks are worth a slot."""
    candidates = range(row[Due.SINK_END], row[Due.FIRST_RECENT])
    far = set() if row[Due.IS_NEW] else held & set(candidates)
    values = {block: value_of(given, row, group, block) for block in candidates}
    bonus = 1 + given.policy.hysteresis
    ranked = sorted(candidates, key=lambda block: (values[block] * (bonus if block in far else 1), block), reverse=True)
    worth = [block for block in ranked if values[block] >= given.policy.threshold]
    chosen = worth[: row[Due.WANT]]
    new = [block for block in chosen if block not in far]
    num_listed = (given.short_list.shape[2] - LIST_HEADER) // 2
    most = len(new) if row[Due.LONG_START] >= 0 else min(num_listed, max(0, len(chosen) + num_listed - len(far)))
    comes = new[: min(most, row[Due.CAP])]
    excess = max(0, len(far) + len(comes) - len(chosen))
    if row[Due.LONG_START] < 0:
        excess = min(excess, num_listed)
    goes = [block for block in reversed(ranked) if block in far][:excess]
    forced = {*range(row[Due.SINK_END]), *range(row[Due.FIRST_RECENT], row[Due.END])}
    return (far - set(goes)) | set(comes) | forced, sorted(comes), sorted(goes), len(worth)


def listed(given: ChoiceInputs, row: list[int], line: int, group: int) -> tuple[list[int], list[int]]:
    """The positions that a list says to come and to go."""
    header = given.short_list[line, group].tolist()
    num_coming, num_going = header[COMES], header[GOES]
    num_listed = (len(header) - LIST_HEADER) // 2
    if row[Due.LONG_START] < 0:
        start, second = LIST_HEADER, LIST_HEADER + num_listed
        return header[start : start + num_coming], header[second : second + num_going]
    start = row[Due.LONG_START] + group * (row[Due.FIRST_RECENT] - row[Due.SINK_END])
    long_list = given.long_list.tolist()
    return long_list[start : start + num_coming], long_list[start + num_coming : start + num_coming + num_going]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("case", CASES)
def test_one_row_at_a_time(case: ChoiceCase, seed: int) -> None:
    given = make_inputs(case._replace(seed=10 * case.seed + seed))
    before = given.in_set.clone()
    choose_sets(*given)
    others = torch.ones(case.num_places, dtype=torch.bool)
    for line, row in enumerate(given.rows.tolist()):
        for group in range(case.num_groups):
            header = given.short_list[line, group].tolist()
            if row[Due.PLACE] < 0:
                assert header == [-1] + [POISON] * (len(header) - 1)
                continue
            others[row[Due.PLACE]] = False
            held = set(before[group, row[Due.PLACE]].nonzero()[:, 0].tolist())
            new_set, comes, goes, num_worth = choose_one(given, row, group, held)
            assert header[:LIST_HEADER] == [row[Due.PLACE], 100 + line, 7, len(comes), len(goes), num_worth]
            assert listed(given, row, line, group) == (comes, goes)
            assert set(given.in_set[group, row[Due.PLACE]].nonzero()[:, 0].tolist()) == new_set
    assert torch.equal(given.in_set[:, others], before[:, others])
    assert given.long_list[-3:].tolist() == [POISON] * 3


def one_row(memory: list[float], held: list[int], policy: ChoicePolicy, **fields: int) -> ChoiceInputs:
    """A row at place 0 whose memory knows all blocks; candidates are all but the last one, lists of two."""
    num_blocks = len(memory)
    given = {Due.NUM_BLOCKS: num_blocks, Due.FIRST_RECENT: num_blocks - 1, Due.END: num_blocks, Due.CAP: num_blocks}
    given |= {Due.LONG_START: -1} | {Due[name.upper()]: value for name, value in fields.items()}
    in_set = torch.zeros(1, 1, num_blocks, dtype=torch.int8)
    in_set[0, 0, held] = 1
    return ChoiceInputs(
        torch.tensor(memory).view(1, 1, 1, -1), in_set, make_rows([given], 1, tile=1), torch.ones(1), policy,
        torch.full((1, 1, LIST_HEADER + 4), POISON, dtype=torch.int32), torch.zeros(0, dtype=torch.int32),
    )  # fmt: skip


def test_of_equal_blocks_the_newest_stay_and_come_and_the_oldest_go() -> None:
    given = one_row([0.5] * 8, [0, 1, 2, 7], ChoicePolicy(), want=3, cap=2)
    choose_sets(*given)
    assert listed(given, given.rows[0].tolist(), 0, 0) == ([5, 6], [0, 1])


def test_a_block_in_the_set_stays_unless_another_is_worth_more_than_its_bonus() -> None:
    for other, comes, goes in ((0.39, [], []), (0.41, [3], [1])):
        given = one_row([0.0, 0.2, 0.0, other, 0.0], [1, 4], ChoicePolicy(hysteresis=1.0), want=1)
        choose_sets(*given)
        assert listed(given, given.rows[0].tolist(), 0, 0) == (comes, goes)


def test_the_block_behind_a_good_one_is_good() -> None:
    given = one_row([0.0, 0.8, 0.0, 0.3, 0.0], [], ChoicePolicy(successor=0.5), want=2)
    choose_sets(*given)
    assert listed(given, given.rows[0].tolist(), 0, 0)[0] == [1, 2]


def test_what_is_not_worth_a_slot_goes_and_leaves_room_for_nobody() -> None:
    given = one_row([0.1, 0.3, 0.1, 0.1, 0.0], [0, 2], ChoicePolicy(hysteresis=9.0, threshold=0.2), want=3)
    choose_sets(*given)
    assert listed(given, given.rows[0].tolist(), 0, 0) == ([1], [0, 2])
    assert given.short_list[0, 0, WORTH] == 1


def test_a_list_that_is_too_short_goes_on_the_next_time() -> None:
    """Seven blocks have to go, two a list; the first ones make no room for anybody."""
    given = one_row([0.0] * 8 + [0.9, 0.0], list(range(8)), ChoicePolicy(), want=1)
    steps = []
    for _ in range(5):
        choose_sets(*given)
        steps.append(listed(given, given.rows[0].tolist(), 0, 0))
    assert steps == [([], [0, 1]), ([], [2, 3]), ([], [4, 5]), ([8], [6, 7]), ([], [])]


def test_wrong_arguments_are_named() -> None:
    given = make_inputs(CASES[1])
    with pytest.raises(ValueError, match=r"in_set: expected shape \[1, 9, 45\], got \[1, 9, 44\]"):
        choose_sets(*given._replace(in_set=given.in_set[:, :, :44]))
    with pytest.raises(ValueError, match=r"short_list: expected 6 columns and an even number more, got 105"):
        choose_sets(*given._replace(short_list=given.short_list[:, :, 1:].contiguous()))
    with pytest.raises(ValueError, match=r"policy: expected to combine by 'sum' or 'max', got 'mean'"):
        choose_sets(*given._replace(policy=given.policy._replace(combine="mean")))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"in_set: expected dtype torch.int8, got torch.bool"):
        choose_sets(*given._replace(in_set=given.in_set.bool()))
