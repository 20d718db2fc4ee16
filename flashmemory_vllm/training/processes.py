"""The processes that train together: one, or as many as torchrun started."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from flashmemory_vllm.processes.parents import end_with


@dataclass(frozen=True, slots=True)
class Processes:
    """This process and how many there are.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        """Join those that torchrun started, as its environment variables tell; without them train alone."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls()
        # Of those that torchrun started none ends by itself when it is killed
        end_with([os.getppid()], logging.getLogger(__name__).error)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(distributed.get_rank(), world_size)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over all processes."""
        return model if self.world_size == 1 else DistributedDataParallel(model)

    def mean(self, columns: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Mean of each column's numbers over all processes, NaN left out; NaN without any number."""
        gathered: list[Any] = [columns]
        if self.world_size > 1:
            gathered = [None] * self.world_size
            distributed.all_gather_object(gathered, dict(columns))
        means = {}
        for name in columns:
            values = [value for part in gathered for value in part[name] if not math.isnan(value)]
            means[name] = math.fsum(values) / len(values) if values else math.nan
        return means

    def leave(self) -> None:
        """End working together."""
        if self.world_size > 1:
            distributed.destroy_process_group()
