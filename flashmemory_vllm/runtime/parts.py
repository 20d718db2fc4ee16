"""What a worker's residency runtime is assembled from."""

from dataclasses import dataclass, field

import torch

from flashmemory_vllm.indexer.base import Selector
from flashmemory_vllm.kinds.base import PageKind
from flashmemory_vllm.observability.counters import CounterWriter
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.runtime.choices import ChoiceQueue
from flashmemory_vllm.runtime.prefill import StreamedPrefill
from flashmemory_vllm.runtime.queries import QueryRing
from flashmemory_vllm.runtime.question import QuestionQueries
from flashmemory_vllm.runtime.shape import AttentionShape
from flashmemory_vllm.runtime.tables import StepTables
from flashmemory_vllm.runtime.uploads import UploadRing
from flashmemory_vllm.transfer.engine import TransferEngine


@dataclass(frozen=True, slots=True, eq=False)
class StepBuffers:
    """The device tensors that captured CUDA graphs refer to; they outlive a runtime.

    Attributes:
        tables: compacted tables and slot mappings.
        queries: captured queries, by the places of the same tables.
    """

    tables: StepTables
    queries: QueryRing


@dataclass(frozen=True, slots=True, eq=False)
class RuntimeParts:
    """What a runtime is assembled from.

    Attributes:
        shape: the model's attention layers.
        groups: layer indices of each layer group.
        anchors: layers whose queries and keys feed the selector.
        planner: decides residency.
        engine: moves pages.
        kind: what pages mean.
        selector: scores blocks.
        choices: has the device choose sets by what the selector says.
        buffers: what attention reads and where it leaves its queries.
        questions: the queries that first selections are made with.
        prefill: attention over history that is not on the device.
        counters: this worker's shared counters.
        check_integrity: check every invariant at every step.
        poison: overwrite free slots with NaN at every step.
        id_ring: takes the ids of full blocks, 16 bytes for each of them and group.
        key_views: keys of anchor layers' pages where they lie, of those that were asked for.
    """

    shape: AttentionShape
    groups: tuple[tuple[int, ...], ...]
    anchors: tuple[int, ...]
    planner: StepPlanner
    engine: TransferEngine
    kind: PageKind
    selector: Selector
    choices: ChoiceQueue
    buffers: StepBuffers
    questions: QuestionQueries
    prefill: StreamedPrefill
    counters: CounterWriter
    check_integrity: bool
    poison: bool
    id_ring: UploadRing
    key_views: dict[int, torch.Tensor] = field(default_factory=dict)
