"""Reads texts in float32: how much less likely each token is than the likeliest one.

It is the model of `transformers`, not a second engine: vLLM's kernels for LoRA have no float32 on CUDA, and its Triton
attention rounds float32 to TF32, which is as coarse as float16. All tokens of a text come of one pass.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file

from flashmemory_vllm.soak.judge import Query
from flashmemory_vllm.soak.settings import Device

_PREFIX, _DOWN, _UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


class TextReader:
    """A model in float32, with the weights that an engine of another dtype has.

    Args:
        model: folder of the model; read when the first text is.
        adapters: folders of LoRA adapters, of linear layers of the model.
        dtype: of the engine that wrote the texts; weights are rounded to it.
        device: where to read.
    """

    def __init__(self, model: Path, adapters: Sequence[Path], dtype: str, device: Device) -> None:
        self._path, self._adapters, self._device = model, adapters, device
        self._dtype: torch.dtype = getattr(torch, dtype)

    @torch.no_grad()
    def deficits(self, queries: Sequence[Query]) -> list[list[float]]:
        """For each of a prompt's last `max_tokens` tokens, by how much its log-probability is below the highest."""
        found: dict[int, list[float]] = {}
        for adapter in {query.adapter for query in queries}:
            with self._adapted(adapter):
                found |= {at: self._read(one) for at, one in enumerate(queries) if one.adapter == adapter}
        return [found[at] for at in range(len(queries))]

    def _read(self, query: Query) -> list[float]:
        ids = torch.tensor([query.prompt], device=self._device)
        # What is said at a token is about the next one
        output = self._model(ids[:, :-1], use_cache=False, logits_to_keep=query.max_tokens)
        logits = output.logits[0].float()
        tokens = ids[0, -query.max_tokens :]
        return [float(one) for one in logits.amax(1) - logits.gather(1, tokens[:, None])[:, 0]]

    @cached_property
    def _model(self) -> torch.nn.Module:
        from transformers import AutoModelForCausalLM

        # vLLM sets it by a variable of the environment
        torch.set_float32_matmul_precision("highest")
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(self._path, dtype=torch.float32)
        model.to(self._device).eval()
        for weight in model.parameters():
            weight.copy_(self._rounded(weight))
        return model

    @contextmanager
    def _adapted(self, adapter: int) -> Iterator[None]:
        """The model with an adapter, or without one for 0."""
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        if adapter:
            folder = self._adapters[adapter - 1]
            described = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "adapter_model.safetensors", device=self._device)
            for down in (name for name in tensors if name.endswith(_DOWN)):
                layer = down.removesuffix(_DOWN)
                weight: torch.Tensor = self._model.get_parameter(layer.removeprefix(_PREFIX) + ".weight")
                kept.append((weight, weight.clone()))
                change = self._rounded(tensors[layer + _UP]) @ self._rounded(tensors[down])
                weight += change * (described["lora_alpha"] / described["r"])
        try:
            yield
        finally:
            for weight, before in kept:
                weight.copy_(before)

    def _rounded(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.to(self._dtype).float()
