"""The blocks that became full and their slots reach a selector in one upload, aligned as kernels are compiled for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from flashmemory_vllm.residency.types import WriteBacks
from flashmemory_vllm.runtime import index_keys


@pytest.mark.parametrize("count", [1, 2, 5])
def test_ids_of_all_groups_come_in_one_upload(count: int) -> None:
    uploads: list[torch.Tensor] = []
    added: list[tuple[Any, ...]] = []

    def upload(array: npt.NDArray[Any]) -> torch.Tensor:
        uploads.append(torch.from_numpy(array))
        return uploads[-1]

    layout = SimpleNamespace(page_view=lambda _: torch.zeros(9, 8), unflatten=lambda _, pages: pages)
    parts: Any = SimpleNamespace(
        selector=SimpleNamespace(needs_keys=True),
        groups=((0, 2), (1,)),
        anchors=(0, 1, 2),
        id_ring=SimpleNamespace(upload=upload),
        key_views={},
        shape=SimpleNamespace(device=torch.device("cpu")),
        engine=SimpleNamespace(layout=layout),
        kind=SimpleNamespace(page_format=SimpleNamespace(keys_are_views=True, keys=lambda pages: pages)),
        choices=SimpleNamespace(guard=SimpleNamespace(add_blocks=lambda *given: added.append(given))),
    )
    blocks = np.arange(20, 20 + count, dtype=np.int32)
    slots = np.stack((np.arange(1, 1 + count), np.arange(8, 8 - count, -1))).astype(np.int32)
    index_keys.index_full_blocks(parts, WriteBacks(blocks, slots))
    index_keys.index_full_blocks(parts, WriteBacks(blocks[:0], slots[:, :0]))
    ((on_host, block_ids, _, of_anchors),) = added
    assert len(uploads) == 1
    assert on_host is blocks
    assert block_ids.tolist() == blocks.tolist()
    assert [of_anchor.tolist() for of_anchor in of_anchors] == [slots[group].tolist() for group in (0, 1, 0)]
    for ids in (block_ids, *of_anchors):
        assert ids.dtype == torch.int64
        assert ids.is_contiguous()
        assert (ids.data_ptr() - uploads[0].data_ptr()) % 16 == 0
