"""The device's side of `Books`: a memory of tags, one step behind the host, that chooses sets by random scores."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt
import torch
from flashmemory_kernels.choose_sets import ChoicePolicy, choose_sets
from flashmemory_kernels.common.due_rows import Due, make_rows

from flashmemory_vllm.residency.lists import HEADER, NOBODY
from flashmemory_vllm.residency.types import Copies, IntArray

NOTHING_YET, GARBAGE = -1, -2
MOST_WEIGHT = 4


@dataclass(frozen=True)
class DeviceRow:
    """A row of a step as the host has planned it: by group the slots that it reads and the positions in them."""

    place: int
    epoch: int
    num_tokens: int
    blocks: list[int]
    slots: list[IntArray]
    positions: list[IntArray]


@dataclass(frozen=True)
class Ask:
    """A row that is chosen for: its budget, recent blocks and sink then, and how many blocks may come."""

    place: int
    epoch: int
    end: int
    budget: int
    recent: int
    sink: int
    most: int
    is_new: bool

    def fields(self, step: int, width: int) -> dict[Due, int]:
        """As the device reads them."""
        first_recent = self.end - self.recent
        return {
            Due.PLACE: self.place,
            Due.EPOCH: self.epoch,
            Due.STEP: step,
            Due.IS_NEW: self.is_new,
            Due.NUM_BLOCKS: first_recent,
            Due.SINK_END: self.sink,
            Due.FIRST_RECENT: first_recent,
            Due.END: self.end,
            Due.WANT: max(0, self.budget - self.recent - self.sink),
            Due.CAP: min(self.most, width),
            Due.LONG_START: -1,
        }


@dataclass(frozen=True)
class DeviceStep:
    """What one step computes and chooses.

    Attributes:
        number: of the step.
        rows: decode rows.
        prompts: blocks that a prompt writes, all of them, and the slots that some of them have by group.
        asks: rows to choose for.
    """

    number: int
    rows: list[DeviceRow]
    prompts: list[tuple[list[int], list[Copies]]]
    asks: list[Ask]


class DeviceTwin:
    """Slots, host pool and sets; every read is compared with what the block ought to hold.

    Attributes:
        in_set: int8 `[G, P, W]`, the sets with all lists so far applied.
        lists: by step int32 `[n, G, 6 + 2 W]`.
    """

    def __init__(self, random: Random, num_groups: int, num_places: int, width: int, memory: tuple[int, int]) -> None:
        num_blocks, num_slots = memory
        self._numbers, self._width = np.random.default_rng(random.randrange(2**32)), width
        self._slots = np.full((num_groups, num_slots), NOTHING_YET, np.int64)
        self._host = np.full(num_blocks, NOTHING_YET, np.int64)
        self._content = np.full(num_blocks, NOTHING_YET, np.int64)
        self._num_tags = 0
        self.in_set: npt.NDArray[np.int8] = np.zeros((num_groups, num_places, width), np.int8)
        self.lists: dict[int, IntArray] = {}

    def write(self, blocks: list[int]) -> None:
        """Blocks get content and host copies, as by a prompt in earlier steps."""
        for block in blocks:
            self._num_tags += 1
            self._host[block] = self._content[block] = self._num_tags

    def load(self, copies: Copies) -> None:
        """A copy from the host lands."""
        self._slots[copies.group, copies.slots] = self._host[copies.blocks]

    def run(self, step: DeviceStep, block_size: int, epochs: IntArray) -> None:
        """Read what each row names, write its token, save what is full; then choose.

        Args:
            step: what the host has planned.
            block_size: tokens of a block.
            epochs: int32 `[P]` as they are by now: a row whose request has ended meanwhile runs all the same.
        """
        for blocks, held in step.prompts:
            self.write(blocks)
            for copies in held:
                self._slots[copies.group, copies.slots] = self._content[copies.blocks]
        for row in step.rows:
            if row.epoch != epochs[row.place]:
                for group, slots in enumerate(row.slots):
                    self._slots[group, slots[-1]] = GARBAGE
                continue
            begins = (row.num_tokens - 1) % block_size == 0
            tail = row.blocks[-1]
            if begins:
                self._num_tags += 1
                self._content[tail] = self._num_tags
            for group, (slots, positions) in enumerate(zip(row.slots, row.positions, strict=True)):
                self._slots[group, slots[-1]] = self._content[tail]
                expected = self._content[np.array(row.blocks)[positions]]
                assert (self._slots[group, slots] == expected).all(), f"step {step.number} place {row.place}"
            if row.num_tokens % block_size == 0:
                self._host[tail] = self._content[tail]
        self._choose(step.asks, step.number)

    def _choose(self, asks: list[Ask], step: int) -> None:
        """The device's own operation, with memory that is made up anew and often alike."""
        memory = torch.from_numpy(self._numbers.integers(0, MOST_WEIGHT, (1, *self.in_set.shape)).astype(np.float32))
        rows = make_rows([ask.fields(step, self._width) for ask in asks], len(asks), tile=self._width)
        num_groups = len(self.in_set)
        short_list = torch.full((len(asks), num_groups, HEADER + 2 * self._width), NOBODY, dtype=torch.int32)
        in_set = torch.from_numpy(self.in_set)
        policy = ChoicePolicy(hysteresis=1.0)
        choose_sets(memory, in_set, rows, torch.ones(1), policy, short_list, torch.zeros(0, dtype=torch.int32))
        self.lists[step] = short_list.numpy()
