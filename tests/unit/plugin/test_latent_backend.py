"""What the backends of latent attention put between vLLM and its own: a batch in two runs, absorbed queries."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashmemory_vllm.plugin.backends.common import STEP_METADATA, StepMetadata
from flashmemory_vllm.plugin.backends.latent import LatentBuilder, LatentImpl

HEADS, NOPE, ROPE, LATENT, VALUE = 3, 4, 2, 8, 5
NUM_DECODE, NUM_PREFILL, BLOCK_SIZE = 2, 4, 4


class PlatformImpl:
    """Notes the metadata that it is called with."""

    kv_lora_rank, qk_nope_head_dim = LATENT, NOPE

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def forward_mha(self, *args: Any) -> None:
        self.calls.append(("mha", args[4]))

    def forward_mqa(self, *args: Any) -> Any:
        (latent, _), _, metadata, _ = args
        self.calls.append(("mqa", metadata))
        return torch.zeros(len(latent), HEADS, LATENT), None

    def do_kv_cache_update(self, *args: Any) -> None:
        self.calls.append(("write", args[3].tolist()))


class Impl(LatentImpl, PlatformImpl):
    pass


class Runtime:
    """Completes the second row of each run, with ones; notes what it was told."""

    def __init__(self, *, is_heard: bool = True) -> None:
        self.told: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._is_heard = is_heard

    def is_heard(self, layer: int) -> bool:
        return self._is_heard and layer == 7

    def slot_mapping(self, group: int, num_tokens: int) -> torch.Tensor:
        return torch.tensor([5, 3, -1])[:num_tokens] + 0 * group

    def attended(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        first_token: int = 0,
    ) -> list[slice]:
        assert layer == 7
        assert torch.equal(value, key[..., :LATENT])
        self.told.append((first_token, query, key, output))
        output[1:2] = 1.0
        return [slice(1, 2)]


def _layer() -> Any:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(HEADS, *size, generator=generator) for size in ((NOPE, LATENT), (LATENT, VALUE)))
    return SimpleNamespace(W_UK_T=keys, W_UV=values)


def _bound(runtime: Runtime) -> tuple[Impl, Any, Any]:
    impl, layer = Impl(), _layer()
    impl.bind(layer, runtime, 7, 1)  # type: ignore[arg-type]
    metadata = SimpleNamespace(num_decode_tokens=NUM_DECODE, **{STEP_METADATA: StepMetadata(["first", "second"])})
    return impl, layer, metadata


def test_rows_in_prefill_are_told_of_as_decode_rows_are() -> None:
    """Absorbed queries ask latents what the model's own ask the keys made of them."""
    runtime = Runtime()
    impl, layer, metadata = _bound(runtime)
    query = torch.randn(NUM_PREFILL, HEADS, NOPE + ROPE)
    latents, rope = torch.randn(NUM_PREFILL, LATENT), torch.randn(NUM_PREFILL, 1, ROPE)
    output = torch.zeros(NUM_PREFILL, HEADS * VALUE)
    nothing = torch.empty(0)
    impl.forward_mha(query, latents, rope, nothing, metadata, nothing, output)
    assert impl.calls == [("mha", "second")]
    [(first_token, absorbed, key, _)] = runtime.told
    assert first_token == NUM_DECODE
    made = torch.einsum("kl,hpl->khp", latents, layer.W_UK_T)
    expected = torch.einsum("thp,khp->htk", query[..., :NOPE], made)
    expected += torch.einsum("thr,kr->htk", query[..., NOPE:], rope[:, 0])
    torch.testing.assert_close(torch.einsum("thd,kd->htk", absorbed, key[:, 0]), expected)
    # What was completed goes through the projection of values, and nothing else does
    torch.testing.assert_close(output[1], layer.W_UV.sum(1).flatten())
    assert (output[[0, 2, 3]] == 0).all()


def test_decode_rows_own_what_has_been_written() -> None:
    runtime = Runtime()
    impl, layer, metadata = _bound(runtime)
    cache = torch.randn(3, BLOCK_SIZE, LATENT + ROPE)
    query = torch.randn(3, HEADS, LATENT), torch.randn(3, HEADS, ROPE)
    latents, _ = impl.forward_mqa(query, cache, metadata, layer)
    assert impl.calls == [("mqa", "second")]
    [(first_token, absorbed, key, output)] = runtime.told
    assert first_token == 0
    assert torch.equal(absorbed, torch.cat(query, dim=-1))
    assert torch.equal(key[:2, 0], cache.flatten(0, 1)[[5, 3]])
    assert output is latents
    assert (latents[1] == 1).all()


@pytest.mark.parametrize("is_in_step", [True, False])
def test_a_layer_that_nobody_asks_costs_nothing(is_in_step: bool) -> None:
    runtime = Runtime(is_heard=not is_in_step)
    impl, layer, metadata = _bound(runtime)
    if not is_in_step:
        delattr(metadata, STEP_METADATA)
    nothing = torch.empty(0)
    impl.forward_mha(nothing, nothing, nothing, nothing, metadata, nothing, nothing)
    impl.forward_mqa((torch.empty(2, 1, 1), nothing), nothing, metadata, layer)
    assert not runtime.told


def test_latents_are_written_into_the_slots_of_their_own_group() -> None:
    impl, _, _ = _bound(Runtime())
    nothing = torch.empty(0)
    impl.do_kv_cache_update(nothing, nothing, nothing, torch.tensor([9, 9]), "auto", nothing)
    assert impl.calls == [("write", [5, 3])]


class PrefillBackend:
    """Of which each clone is another one."""

    def clone(self) -> "PrefillBackend":
        return PrefillBackend()


class PlatformBuilder:
    """Keeps no names of layers."""

    # As vLLM's for some platforms: a chunk of a prompt would be decode
    reorder_batch_threshold = 512

    def __init__(self, spec: Any, layer_names: list[str]) -> None:
        del spec, layer_names
        self._prefill_backend = PrefillBackend()


class Builder(LatentBuilder, PlatformBuilder):
    pass


def test_each_group_has_a_backend_of_prefill_and_one_token_alone_is_decode() -> None:
    builder = Builder(None, ["a"])
    assert (builder.layer_names, builder.reorder_batch_threshold) == (["a"], 1)
    made = []
    for group in (0, 1, 0, 1):
        builder.begin_group(group)
        made.append(builder._prefill_backend)
    assert made[0] is made[2]
    assert made[1] is made[3]
    assert made[0] is not made[1]
