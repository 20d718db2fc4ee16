"""How a kernel cuts rows into tiles, and tiles into programs."""

from typing import NamedTuple

import torch


class TileConfig(NamedTuple):
    """How work over many rows is cut.

    Attributes:
        tile_rows: rows of one tile.
        programs: programs of one multiprocessor, which share all tiles; 0 gives each tile a program of its own.
        num_warps: warps of a program.
        num_stages: tiles that a program works on at once, from loading to storing.
    """

    tile_rows: int
    programs: int
    num_warps: int
    num_stages: int

    def num_programs(self, num_tiles: int, num_columns: int, device: torch.device) -> int:
        """Programs that share the tiles of one column.

        Args:
            num_tiles: tiles of a column, 1 or more.
            num_columns: columns, such as layers and heads, that all have as many.
            device: where they run; a CPU counts as one multiprocessor.
        """
        if self.programs == 0:
            return num_tiles
        on_device = self.programs * _num_multiprocessors(device)
        return min(num_tiles, max(1, on_device // num_columns))


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
