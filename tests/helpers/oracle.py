"""Recomputes every attention output of a running engine from the logical KV, and compares.

The oracle knows nothing of slots. It keeps every key and value under its logical block, as vLLM's own slot
mapping says before we translate it, and reads a row's history through vLLM's own block table. A prefill row must
equal softmax over all earlier tokens; a decode row, softmax over the tokens of exactly the blocks in the row's
resident set, the one thing that the oracle takes from the planner.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from flashmemory_vllm.residency.types import Phase, Row
from flashmemory_vllm.runtime.runtime import ResidencyRuntime
from flashmemory_vllm.runtime.tables import StepTables

Kind: TypeAlias = Literal["dense_decode", "sparse_decode", "prefill", "streamed_prefill", "same_step_prefill"]
# The arguments of one call of a method, by name
Call: TypeAlias = SimpleNamespace


@dataclass(slots=True)
class Checked:
    """What was compared of one kind of rows.

    Attributes:
        rows: batch rows, each counted once for all its layers.
        outputs: attention outputs, one for each row and layer.
        max_error: largest deviation of an output from the oracle's, relative to the largest element of it;
            NaN if any output was not finite.
    """

    rows: int = 0
    outputs: int = 0
    max_error: float = 0.0

    def add(self, error: float, *, is_first_layer: bool) -> None:
        """Count one output."""
        self.rows += is_first_layer
        self.outputs += 1
        # Never back from NaN
        self.max_error = float(np.maximum(self.max_error, error))


@dataclass(slots=True)
class _Batch:
    """One step as vLLM sees it: `block_table` [R, W], `bounds` [R + 1] of the rows' tokens, `seq_lens` [R]."""

    block_table: torch.Tensor
    bounds: list[int]
    seq_lens: list[int]


class AttentionOracle:
    """Watches the engine of this process; install before it is built.

    Attributes:
        checked: the outcome so far, by kind of row.
    """

    def __init__(self) -> None:
        self.checked: dict[Kind, Checked] = {}
        self._slots = torch.empty(0, dtype=torch.int64)
        self._rows: Sequence[Row] = ()
        self._batch = _Batch(torch.empty(0), [], [])
        self._history: dict[int, torch.Tensor] = {}

    def install(self) -> None:
        """Look over the shoulder of our builder, runtime and attention implementation."""
        from flashmemory_vllm.plugin.backends.common import CompactedBuilder, ResidentImpl

        _before(ResidencyRuntime, "translate_slots", self._see_slots)
        _before(StepTables, "fill", self._see_rows)
        _before(CompactedBuilder, "build", self._see_batch)
        _before(ResidentImpl, "do_kv_cache_update", self._see_keys)
        _after(ResidentImpl, "forward", self._check)

    def _see_slots(self, call: Call) -> None:
        self._slots = call.slot_mapping.clone().reshape(-1)

    def _see_rows(self, call: Call) -> None:
        self._rows = call.rows

    def _see_batch(self, call: Call) -> None:
        metadata = call.common_attn_metadata
        num_rows = metadata.num_reqs
        self._batch = _Batch(
            metadata.block_table_tensor[:num_rows].long(),
            metadata.query_start_loc[: num_rows + 1].tolist(),
            metadata.seq_lens[:num_rows].tolist(),
        )

    def _see_keys(self, call: Call) -> None:
        impl = call.self
        if not _in_step(impl):
            return
        is_token = self._slots >= 0
        both = torch.stack((call.key, call.value), dim=1)[: len(self._slots)][is_token]
        if impl.layer_index not in self._history:
            num_tokens = impl.runtime.num_logical_blocks * _block_size(impl)
            # Whatever was never written is NaN, so that reading it shows
            self._history[impl.layer_index] = torch.full((num_tokens, *both.shape[1:]), torch.nan)
        self._history[impl.layer_index][self._slots[is_token]] = both.float()

    def _check(self, call: Call) -> None:
        impl, query = call.self, call.query
        if not _in_step(impl):
            return
        outputs = call.output.view_as(query)
        for index, row in enumerate(self._rows):
            tokens = slice(*self._batch.bounds[index : index + 2])
            positions = self._positions(impl, index, row)
            history = self._history[impl.layer_index][self._logical_slots(impl, index, positions)]
            end = self._batch.seq_lens[index]
            queries = torch.arange(end - (tokens.stop - tokens.start), end)
            hidden = positions[None, :] > queries[:, None]
            expected = _attention(query[tokens], history[:, 0], history[:, 1], hidden, impl.scale)
            error = float((outputs[tokens].double() - expected).abs().max() / expected.abs().max())
            checked = self.checked.setdefault(self._kind(impl, index, row), Checked())
            checked.add(error, is_first_layer=impl.layer_index == 0)

    def _positions(self, impl: Any, index: int, row: Row) -> torch.Tensor:
        """Tokens that a row is to attend to: int64 positions in its request, ascending."""
        every = torch.arange(self._batch.seq_lens[index])
        if row.phase is Phase.PREFILL:
            return every
        blocks = torch.from_numpy(row.positions[impl.group].astype(np.int64))
        return every[torch.isin(every // _block_size(impl), blocks)]

    def _logical_slots(self, impl: Any, index: int, positions: torch.Tensor) -> torch.Tensor:
        size = _block_size(impl)
        return self._batch.block_table[index, positions // size] * size + positions % size

    def _kind(self, impl: Any, index: int, row: Row) -> Kind:
        if row.phase is Phase.DECODE:
            return "sparse_decode" if row.evicted_tokens[impl.group] else "dense_decode"
        if not len(row.streamed[impl.group]):
            return "prefill"
        history = self._logical_slots(impl, index, torch.arange(row.num_computed_tokens))
        is_new = torch.isin(history, self._slots).any()
        return "same_step_prefill" if is_new else "streamed_prefill"


def _in_step(impl: Any) -> bool:
    return impl.runtime is not None and impl.runtime.in_step


def _block_size(impl: Any) -> int:
    size: int = impl.runtime._parts.shape.block_size
    return size


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax attention in float64: [T, Hq, D] over [K, Hkv, D], where `hidden` [T, K] is masked."""
    num_queries, num_heads, head_dim = query.shape
    grouped = query.double().view(num_queries, key.shape[1], -1, head_dim)
    scores = scale * torch.einsum("tgrd,kgd->grtk", grouped, key.double())
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("grtk,kgd->tgrd", weights, value.double()).reshape(num_queries, num_heads, head_dim)


def _before(owner: type, name: str, look: Callable[[Call], None]) -> None:
    """Let `look` see each call of a method first."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        look(_call(original, args, kwargs))
        return original(*args, **kwargs)

    setattr(owner, name, method)


def _after(owner: type, name: str, look: Callable[[Call], None]) -> None:
    """Let `look` see each call of a method when it is done, with what it wrote into its arguments."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        look(_call(original, args, kwargs))
        return result

    setattr(owner, name, method)


def _call(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return SimpleNamespace(**inspect.signature(method).bind(*args, **kwargs).arguments)
