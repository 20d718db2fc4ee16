"""A model without weights around a real runtime: what each attention layer gives is compared with the logical KV.

Keys, values and queries of a token follow from its tag (see `scheduler_twin.Request`), so nobody has to remember what
was written where. A prefill row must see all earlier tokens, a decode row the tokens of its resident blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.partial_attention import partial_attention

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.indexer.exact import ExactSelector
from flashmemory_vllm.indexer.places import DueRows, PlaceState
from flashmemory_vllm.kinds.base import PageKind
from flashmemory_vllm.kinds.pages import InterleavedPages
from flashmemory_vllm.observability.counters import CounterWriter, worker_name
from flashmemory_vllm.residency.budget import BudgetPolicy, cdiv
from flashmemory_vllm.residency.types import IntArray, Phase, Row, StepInput
from flashmemory_vllm.runtime import assembly
from flashmemory_vllm.runtime.shape import AttentionShape
from flashmemory_vllm.runtime.tables import CompactedTable
from flashmemory_vllm.transfer.engine import TransferEngine
from tests.unit.residency.memory_twin import TagArray
from tests.unit.residency.scheduler_twin import Request, SchedulerTwin

BLOCK_SIZE, NUM_LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM, SCALE = 4, 3, 4, 2, 4, 0.5
# A prime, so that neighbours in one request and equal places of two never share a row
NUM_CONTENTS = 5003
HEADS = [QUERY_HEADS, KV_HEADS, KV_HEADS]
PADDING = 2
QUERY_WINDOW = 5
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Options:
    """What differs between worlds.

    Attributes:
        engine: class of the transfer engine.
        num_groups: layer groups.
        ratio: resident ratio.
        extra_slots: slots beside those that one request of the longest length needs.
        extra_blocks: the same for logical blocks.
        poison: NaN in free slots and staging.
        ours: more options of ours.
    """

    engine: type[TransferEngine]
    num_groups: int = 1
    ratio: float = 0.3
    extra_slots: int = 6
    extra_blocks: int = 60
    poison: bool = True
    check_integrity: bool = True


class ModelTwin:
    """Runs scheduler steps through a runtime and checks every attention output of them.

    Attributes:
        num_sparse: outputs of decode rows that left blocks out.
        num_streamed: outputs of prefill rows that read history from the host.
        num_scored: selections asked for.
    """

    def __init__(self, options: Options, folder: Path, seed: int) -> None:
        self.random = Random(seed)
        self._contents = torch.randn(
            NUM_CONTENTS,
            NUM_LAYERS,
            QUERY_HEADS + 2 * KV_HEADS,
            HEAD_DIM,
            generator=torch.Generator().manual_seed(seed),
        )
        config = FlashMemoryConfig(
            resident_ratio=options.ratio,
            min_sparse_tokens=0,
            sink_tokens=BLOCK_SIZE,
            recent_tokens=2 * BLOCK_SIZE,
            # Its keys as they are, asked with the last token alone
            selector="exact",
            index_dtype="auto",
            memory_decay=0.0,
            question_share=0.0,
            successor_share=0.0,
            hysteresis=0.0,
            tau_steps=3,
            query_window=QUERY_WINDOW,
            growth_reserve_tokens=0,
            staging_blocks=2,
            layer_groups=options.num_groups,
            check_integrity=options.check_integrity,
            poison_free_slots=options.poison,
        )
        self.policy = BudgetPolicy(BLOCK_SIZE, options.ratio, 0, BLOCK_SIZE, 2 * BLOCK_SIZE, 24, 30 * BLOCK_SIZE, 0)
        num_slots = self.policy.worst_case() + 1 + options.extra_slots
        num_blocks = cdiv(self.policy.max_model_len, BLOCK_SIZE) + 1 + options.extra_blocks
        self.scheduler = SchedulerTwin(self.policy, num_blocks, num_slots, self.random)
        shape = AttentionShape(
            ("0", "1", "2"), QUERY_HEADS, KV_HEADS, HEAD_DIM, SCALE, BLOCK_SIZE, torch.float32, torch.device("cpu")
        )
        self.caches = list(torch.full((NUM_LAYERS, num_slots, KV_HEADS, BLOCK_SIZE, 2 * HEAD_DIM), torch.nan))
        self.counters = CounterWriter.create(folder, worker_name(0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(assembly, "CpuTransferEngine", options.engine)
            self.runtime = assembly.build_runtime(
                shape=shape,
                caches=self.caches,
                kind=PageKind(InterleavedPages(KV_HEADS, BLOCK_SIZE, HEAD_DIM), SCALE, partial_attention),
                config=config,
                budget=self.policy,
                sizes=assembly.RuntimeSizes(num_blocks, 2, 16, self.policy.max_num_batched_tokens + PADDING),
                counters=self.counters,
            )
        self.parts = self.runtime._parts
        self.requests: dict[str, Request] = {}
        self.num_sparse = self.num_streamed = self.num_scored = 0
        # Requests without a prefix hit
        self._computed_whole: set[str] = set()
        self._wrong: list[str] = []
        self._watch()

    def add(self, req_id: str, uid: int, num_tokens: int) -> None:
        """A request arrives; half of a prompt may be shared with others of its family."""
        num_prompt = self.random.randint(1, num_tokens - 1)
        num_shared = self.random.choice([0, num_prompt // 2, num_prompt])
        request = Request(req_id, uid, self.random.randrange(3), num_shared, num_prompt, num_tokens - num_prompt)
        self.requests[req_id] = request
        self.scheduler.waiting.append(request)

    def step(self) -> None:
        """One step of scheduler, runtime and model."""
        step = self.scheduler.schedule()
        with self.runtime.step(step):
            if step.num_scheduled_tokens:
                self._computed_whole |= {new.req_id for new in step.new if not new.num_computed_tokens}
                self._forward(step)
        assert not self._wrong, self._wrong
        for req_id in step.finished:
            self.requests.pop(req_id, None)
            self._computed_whole.discard(req_id)
        self.scheduler.step_done(step)
        self.scheduler.ledger.check_integrity()

    def _forward(self, step: StepInput) -> None:
        req_ids = list(step.num_scheduled_tokens)
        self.random.shuffle(req_ids)
        runtime = self.runtime
        assert runtime._plan is not None
        rows = [runtime._plan.rows[req_id] for req_id in req_ids]
        tags, logical, seq_lens = [], [], []
        for req_id in req_ids:
            request, num_tokens = self.requests[req_id], step.num_scheduled_tokens[req_id]
            end = request.num_computed
            places = np.arange(end - num_tokens, end)
            tags.append(request.tags(end - num_tokens, end))
            blocks = np.array(request.block_ids, np.int64)[places // BLOCK_SIZE]
            logical.append(blocks * BLOCK_SIZE + places % BLOCK_SIZE)
            seq_lens.append(end)
        bounds = np.cumsum([0, *map(len, tags)], dtype=np.int32)
        mapping = torch.from_numpy(np.concatenate((*logical, np.full(PADDING, -1, np.int64))))
        lens = torch.tensor([*seq_lens, *[0] * PADDING], dtype=torch.int32)
        runtime.set_batch(req_ids, lens, mapping)
        tables = runtime.compacted_tables(len(lens))
        content = self._of(np.concatenate(tags))
        for layer in range(NUM_LAYERS):
            query, key, value = torch.split(content[:, layer], HEADS, dim=1)
            group = runtime.group_of(layer)
            slots = mapping if group == 0 else runtime.slot_mapping(group, len(mapping))
            self._write(layer, slots, key, value)
            output = self._attend(layer, query, tables[group], bounds)
            runtime.attended(layer, query, key, value, output)
            for index, row in enumerate(rows):
                own = slice(int(bounds[index]), int(bounds[index + 1]))
                self._check(layer, group, row, query[own], output[own])

    def _write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        is_token = slots >= 0
        assert int(is_token.sum()) == len(key), "a token has no slot to be written to"
        at = slots[is_token]
        self.caches[layer][at // BLOCK_SIZE, :, at % BLOCK_SIZE] = torch.cat((key, value), dim=-1)

    def _attend(self, layer: int, query: torch.Tensor, table: CompactedTable, bounds: IntArray) -> torch.Tensor:
        """What the platform's kernel makes of the compacted tables."""
        output = torch.zeros_like(query)
        for index in range(len(bounds) - 1):
            own, length = slice(int(bounds[index]), int(bounds[index + 1])), int(table.seq_lens[index])
            pages = self.caches[layer][table.block_table[index, : cdiv(length, BLOCK_SIZE)].long()]
            both = pages.transpose(1, 2).flatten(0, 1)[:length]
            output[own] = _softmax_attention(query[own], both[..., :HEAD_DIM], both[..., HEAD_DIM:])
        assert (table.seq_lens[len(bounds) - 1 :] == 0).all(), "a row of padding has tokens"
        return output

    def _check(self, layer: int, group: int, row: Row, query: torch.Tensor, output: torch.Tensor) -> None:
        end = row.num_computed_tokens + row.num_tokens
        seen = np.arange(end)
        if row.phase is Phase.DECODE:
            seen = seen[np.isin(seen // BLOCK_SIZE, row.positions[group])]
            self.num_sparse += bool(len(seen) < end)
        self.num_streamed += len(row.streamed[group]) > 0
        tags = self.requests[row.req_id].tags(0, end)[seen]
        _, key, value = torch.split(self._of(tags)[:, layer], HEADS, dim=1)
        expected = _softmax_attention(query, key, value)
        error = float((output.double() - expected).abs().max())
        assert error < TOLERANCE, f"layer {layer}, request {row.req_id}, {row.phase}: off by {error}"

    def _of(self, tags: TagArray) -> torch.Tensor:
        """Queries, keys and values [T, layers, heads, D] of tokens."""
        return self._contents[torch.from_numpy(tags % NUM_CONTENTS)]

    def _watch(self) -> None:
        """Compare what the selector is asked with what it must be."""
        selector = self.parts.selector
        assert isinstance(selector, ExactSelector)
        remember = selector.remember

        def checked_remember(due: DueRows, state: PlaceState) -> None:
            # Noted, not raised: a selector that fails is survived
            for row in range(len(due)):
                self._wrong += self._wrong_in(due, row, state, selector.index)
            self.num_scored += len(due)
            remember(due, state)

        vars(selector)["remember"] = checked_remember

    def _wrong_in(self, due: DueRows, row: int, state: PlaceState, index: torch.Tensor) -> list[str]:
        """What the selector is asked that it should not be, in words."""
        request, place = self.requests[due.req_ids[row]], int(due.fields[row, Due.PLACE])
        last, num_full = request.num_computed - 1, request.num_computed // BLOCK_SIZE
        num_queries, anchors = int(due.fields[row, Due.NUM_QUERIES]), list(self.runtime.anchors)
        end = min(request.num_prompt, last)  # of the question, without the last token
        tags = np.concatenate((request.tags(last, last + 1), request.tags(end - num_queries + 1, end)[::-1]))
        expected_queries = self._of(tags)[:, anchors, :QUERY_HEADS]
        at = (int(due.fields[row, Due.POSITION]) - torch.arange(num_queries)) % state.queries.shape[2]
        block_ids = state.block_ids[place, :num_full]
        keys = self._of(request.tags(0, num_full * BLOCK_SIZE))[:, anchors, QUERY_HEADS : QUERY_HEADS + KV_HEADS]
        expected = keys.reshape(num_full, BLOCK_SIZE, *keys.shape[1:]).permute(2, 0, 3, 1, 4)
        is_right = {
            "another number of blocks": int(due.fields[row, Due.NUM_BLOCKS]) == num_full,
            "other blocks": block_ids.tolist() == request.block_ids[:num_full],
            "queries of other tokens": torch.equal(state.queries[:, place, at].transpose(0, 1), expected_queries),
            "index keys of another block": torch.equal(index[:, block_ids.long()].reshape(expected.shape), expected),
            "a question": due.is_entering or num_queries == 1,
        }
        if due.is_entering and due.req_ids[row] in self._computed_whole:
            start = max(0, request.num_prompt - QUERY_WINDOW)
            is_right["a question cut short"] = num_queries - 1 == end - start
        return [f"request {due.req_ids[row]}: {what}" for what, right in is_right.items() if not right]


def _softmax_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[T, Hq, D] float64: the newest T of K keys [K, Hkv, D] are the queries' own, seen causally."""
    num_queries, num_keys = len(query), len(key)
    keys, values = (part.double().repeat_interleave(QUERY_HEADS // KV_HEADS, 1) for part in (key, value))
    logits = SCALE * torch.einsum("thd,khd->htk", query.double(), keys)
    hidden = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(num_keys - num_queries + 1)
    return torch.einsum("htk,khd->thd", logits.masked_fill(hidden, -torch.inf).softmax(-1), values)
