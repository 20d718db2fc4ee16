"""Every kernel once, before requests come."""

import numpy as np
import torch

from flashmemory_vllm.residency.types import WriteBacks
from flashmemory_vllm.runtime.index_keys import index_full_blocks
from flashmemory_vllm.runtime.parts import RuntimeParts


def warm_up(parts: RuntimeParts) -> None:
    """Run every kernel once on the null block and the null slot, so that no request waits for a compiler."""
    shape, tables, queries = parts.shape, parts.buffers.tables, parts.buffers.queries
    null = np.zeros(1, np.int32)
    tables.warm_up()
    with parts.engine.warming_up(), parts.choices.strict():
        for group in range(len(parts.groups)):
            parts.engine.write_back(group, null, null)
            parts.engine.recall(group, null, null, parts.engine.marker())
        parts.engine.fence(())
        index_full_blocks(parts, WriteBacks(null, np.zeros((len(parts.groups), 1), np.int32)))
        parts.choices.warm_up(queries.row(0).unsqueeze(0))
        query = torch.zeros(2, shape.num_query_heads, shape.head_dim, dtype=shape.dtype, device=shape.device)
        key = query[:, : shape.num_kv_heads].contiguous()
        queries.capture(0, query, tables.query_row(len(query)))
        parts.prefill.warm_up(query, key, key[..., : parts.kind.page_format.value_dim])
