"""Recomputes every attention output of a running engine from the logical KV, and compares.

The oracle knows nothing of slots. It keeps every key and value under its logical block, as vLLM's own slot mapping
says before we translate it, and reads a row's history through vLLM's own block table. A prefill row must equal
softmax over all earlier tokens; a decode row, softmax over the tokens of exactly the blocks in its resident set, the
one thing that the oracle takes from the planner.
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

from flashmemory_vllm.plugin.backends.common import CompactedBuilder, ResidentImpl, runtime_of
from flashmemory_vllm.plugin.backends.latent import LatentImpl
from flashmemory_vllm.residency.types import Phase, Row
from flashmemory_vllm.runtime.runtime import ResidencyRuntime

Kind: TypeAlias = Literal["dense_decode", "sparse_decode", "prefill", "streamed_prefill", "same_step_prefill"]
# The arguments of one call of a method, by name
Call: TypeAlias = SimpleNamespace


@dataclass(slots=True)
class Checked:
    """What was compared of one kind of rows.

    Attributes:
        rows: batch rows, each counted once for all its layers.
        outputs: attention outputs, one for each row and layer.
        max_error: largest deviation of an output from the oracle's, relative to the largest element of that; NaN if
            any output was not finite.
    """

    rows: int = 0
    outputs: int = 0
    max_error: float = 0.0

    def add(self, error: float, *, is_first_layer: bool) -> None:
        """Count one output."""
        self.rows += is_first_layer
        self.outputs += 1
        # numpy's maximum, unlike Python's, never comes back from NaN
        self.max_error = float(np.maximum(self.max_error, error))


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """One step as vLLM sees it.

    Attributes:
        block_table: int64 [R, W] logical blocks of the rows.
        token_bounds: [R + 1] where the rows' tokens begin and end.
        seq_lens: [R] tokens of the rows, those of this step included.
        block_size: tokens in a block.
    """

    block_table: torch.Tensor
    token_bounds: list[int]
    seq_lens: list[int]
    block_size: int


class AttentionOracle:
    """Watches the engine of this process; install before it is built.

    Attributes:
        checked: the outcome so far, by kind of row. Kinds of prefill tell where history came from: slots, the host,
            or the host and blocks that another row wrote in the very step.
    """

    def __init__(self) -> None:
        self.checked: dict[Kind, Checked] = {}
        self._slots = torch.empty(0, dtype=torch.int64)
        self._is_token = torch.empty(0, dtype=torch.bool)
        self._rows: Sequence[Row] = ()
        self._batch = _Batch(torch.empty(0), [], [], 1)
        self._history: dict[int, torch.Tensor] = {}
        # By implementation of latent attention: some let vLLM drop them
        self._weights: dict[int, torch.Tensor] = {}

    def install(self) -> None:
        """Look over the shoulder of our runtime, metadata builder and attention implementation."""
        _watch(ResidencyRuntime, "set_batch", before=self.see_slots, after=self.see_rows)
        _watch(CompactedBuilder, "build", before=self.see_batch)
        _watch(ResidentImpl, "do_kv_cache_update", before=self.see_keys)
        _watch(ResidentImpl, "forward", after=self.check)
        from vllm.model_executor.layers.attention import MLAAttention

        _watch(MLAAttention, "process_weights_after_loading", before=self.see_weights)
        _watch(LatentImpl, "do_kv_cache_update", before=self.see_latents)
        _watch(LatentImpl, "forward_mha", after=self.check_expanded)
        _watch(LatentImpl, "forward_mqa", after=self.check_absorbed)

    def see_slots(self, call: Call) -> None:
        """Keep vLLM's slot mapping, which is still logical."""
        slots = call.slot_mapping.reshape(-1)
        self._is_token = slots >= 0
        self._slots = slots[self._is_token]

    def see_batch(self, call: Call) -> None:
        """Keep vLLM's block table and lengths, which are still logical."""
        if runtime_of(call.self.vllm_config, call.self.layer_names[0]) is None:
            return  # native layers, whose tables are not ours
        metadata = call.common_attn_metadata
        num_rows = metadata.num_reqs
        self._batch = _Batch(
            metadata.block_table_tensor[:num_rows].long(),
            metadata.query_start_loc[: num_rows + 1].tolist(),
            metadata.seq_lens[:num_rows].tolist(),
            call.self.kv_cache_spec.block_size,
        )

    def see_rows(self, call: Call) -> None:
        """Learn the resident sets."""
        plan = call.self._plan
        self._rows = [] if plan is None else [plan.rows[req_id] for req_id in call.req_ids]

    def see_keys(self, call: Call) -> None:
        """Keep the keys and values [T, Hkv, D] of a layer."""
        self._keep(call.self, torch.stack((call.key, call.value), dim=1))

    def see_weights(self, call: Call) -> None:
        """Keep the projection of latents to keys and values, [Hq * (nope + v), latent]."""
        self._weights[id(call.self.impl)] = call.self.kv_b_proj.weight.detach().double()

    def see_latents(self, call: Call) -> None:
        """Keep the latents [T, latent + rope] of a layer."""
        self._keep(call.self, torch.cat((call.kv_c_normed, call.k_pe.squeeze(1)), dim=-1))

    def check(self, call: Call) -> None:
        """Compare a layer's output, row by row."""
        self._check(call.self, call.query, call.output, lambda kept: (kept[:, 0], kept[:, 1]), sinks=call.self.sinks)

    def check_expanded(self, call: Call) -> None:
        """Compare what rows in prefill got, whose keys and values are made of latents."""
        impl = call.self
        dims = (impl.num_heads, impl.qk_nope_head_dim + impl.v_head_dim)

        def expand(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            made = latents[:, : impl.kv_lora_rank].double() @ self._weights[id(impl)].T
            made = made.view(-1, *dims)
            nope, value = made[..., : impl.qk_nope_head_dim], made[..., impl.qk_nope_head_dim :]
            rope = latents[:, None, impl.kv_lora_rank :].expand(-1, impl.num_heads, -1)
            return torch.cat((nope, rope), dim=-1), value

        self._check(impl, call.q, call.output, expand, call.attn_metadata.num_decode_tokens)

    def check_absorbed(self, call: Call) -> None:
        """Compare what other rows got: latents, of which values are still to be made."""
        query = torch.cat(call.q, dim=-1) if isinstance(call.q, tuple) else call.q
        rank = call.self.kv_lora_rank
        self._check(call.self, query, call.result[0], lambda kept: (kept[:, None], kept[:, None, :rank]))

    def _keep(self, impl: Any, tokens: torch.Tensor) -> None:
        """Keep what a layer writes of each token [T, ...]."""
        if not _in_step(impl):
            return
        # On a GPU it may be padded, or the slot mapping
        num_tokens = min(len(tokens), len(self._is_token))
        tokens = tokens[:num_tokens][self._is_token[:num_tokens]]
        if impl.layer_index not in self._history:
            size = impl.runtime.num_logical_blocks * self._batch.block_size
            # Whatever was never written is NaN, so that reading it shows
            self._history[impl.layer_index] = torch.full((size, *tokens.shape[1:]), torch.nan, device=tokens.device)
        self._history[impl.layer_index][self._slots] = tokens.float()

    def _check(
        self,
        impl: Any,
        query: torch.Tensor,
        output: torch.Tensor,
        read: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        first_token: int = 0,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Compare the outputs of a run of the batch, row by row; `read` makes keys and values of what was kept."""
        if not _in_step(impl):
            return
        outputs = output.reshape(*query.shape[:2], -1)
        for index, row in enumerate(self._rows):
            start, stop = (bound - first_token for bound in self._batch.token_bounds[index : index + 2])
            if not 0 <= start < len(query):
                continue
            seq_len = self._batch.seq_lens[index]
            positions = self._positions(index, row, impl.group)
            key, value = read(self._history[impl.layer_index][self._logical_slots(index, positions)])
            asking = torch.arange(seq_len - (stop - start), seq_len, device=positions.device)
            hidden = positions[None, :] > asking[:, None]
            expected = _attention(query[start:stop], key, value, hidden, impl.scale, sinks)
            error = float((outputs[start:stop].double() - expected).abs().max() / expected.abs().max())
            checked = self.checked.setdefault(self._kind(index, row, impl.group), Checked())
            checked.add(error, is_first_layer=impl.layer_index == 0)

    def _positions(self, index: int, row: Row, group: int) -> torch.Tensor:
        """Tokens that a row is to attend to: int64 positions in its request, ascending."""
        device = self._batch.block_table.device
        every = torch.arange(self._batch.seq_lens[index], device=device)
        if row.phase is Phase.PREFILL:
            return every
        blocks = torch.from_numpy(row.positions[group].astype(np.int64)).to(device)
        return every[torch.isin(every // self._batch.block_size, blocks)]

    def _logical_slots(self, index: int, positions: torch.Tensor) -> torch.Tensor:
        size = self._batch.block_size
        return self._batch.block_table[index, positions // size] * size + positions % size

    def _kind(self, index: int, row: Row, group: int) -> Kind:
        if row.phase is Phase.DECODE:
            return "sparse_decode" if row.evicted_tokens[group] else "dense_decode"
        if not len(row.streamed[group]):
            return "prefill"
        earlier = torch.arange(row.num_computed_tokens, device=self._batch.block_table.device)
        history = self._logical_slots(index, earlier)
        return "same_step_prefill" if torch.isin(history, self._slots).any() else "streamed_prefill"


def _in_step(impl: Any) -> bool:
    return impl.runtime is not None and impl.runtime.in_step


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax attention in float64: [T, Hq, D] over keys [K, Hkv, D] and values [K, Hkv, Dv].

    What a query must not see is `hidden` [T, K].

    Sinks [Hq] are logits of one key more, which has no value.

    By matrix products and exponentials alone: vLLM's batch-invariant mode puts its own kernels in the place of batched
    products and of softmax, and those know no float64.
    """
    num_queries, num_heads, head_dim = query.shape
    grouped = query.double().view(num_queries, key.shape[1], -1, head_dim)
    outputs = []
    for group in range(key.shape[1]):
        scores = scale * (grouped[:, group].reshape(-1, head_dim) @ key[:, group].double().T)
        scores = scores.view(num_queries, -1, len(key)).masked_fill(hidden.unsqueeze(1), -torch.inf)
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top).exp()
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total += (sinks.double().view(key.shape[1], -1)[group].unsqueeze(-1) - top).exp()
        weights /= total
        outputs.append((weights.view(-1, len(key)) @ value[:, group].double()).view(num_queries, -1, value.shape[-1]))
    return torch.stack(outputs, dim=1).reshape(num_queries, num_heads, -1)


def _watch(
    owner: type,
    name: str,
    before: Callable[[Call], None] | None = None,
    after: Callable[[Call], None] | None = None,
) -> None:
    """Show each call of a method to `before` first, or to `after` once it has filled its output."""
    original = getattr(owner, name)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        call = SimpleNamespace(**signature.bind(*args, **kwargs).arguments)
        if before is not None:
            before(call)
        result = original(*args, **kwargs)
        if after is not None:
            call.result = result
            after(call)
        return result

    setattr(owner, name, method)
