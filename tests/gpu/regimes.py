"""Where, how and with which model `tests.gpu.exactness` compares our engine with vLLM's own backend."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from tests.helpers.tiny_model import save_tiny_gemma3, save_tiny_gpt_oss, save_tiny_llama, save_tiny_qwen3_next

Case: TypeAlias = Literal["steady", "preempting"]
Mode: TypeAlias = Literal["eager", "piecewise", "graphs"]
ModelName: TypeAlias = Literal["llama", "gemma3", "gpt-oss", "qwen3-next"]
CASES: tuple[Case, ...] = ("steady", "preempting")


@dataclass(frozen=True, slots=True)
class Regime:
    """Where and how both engines run.

    Attributes:
        device: "cpu" or "cuda".
        mode: "eager", "piecewise" for compiled layers in CUDA graphs with attention between them, or "graphs" for
            vLLM's default: whole decode steps in one graph, the others piecewise.
        dtype: dtype of weights, activations and KV cache.
        num_tokens: tokens generated for each prompt.
        runner: vLLM's model runner.
        model: a random one.
    """

    device: str
    mode: Mode
    dtype: Literal["float32", "float16", "bfloat16"]
    num_tokens: int
    runner: Literal["v1", "v2"] = "v2"
    model: ModelName = "llama"

    def __str__(self) -> str:
        kind = f"hybrids-{self.model}-" if self.is_hybrid else ""
        return f"{kind}{self.device}-{self.runner}-{self.mode}-{self.dtype}"

    @property
    def is_hybrid(self) -> bool:
        """Whether the model has windows or states beside full attention."""
        return self.model != "llama"

    @property
    def cases(self) -> tuple[Case, ...]:
        """Those that are measured: of hybrids on a GPU the one in which texts are certain to be the same."""
        return CASES if not self.is_hybrid else CASES[:1]

    def must_agree(self, case: Case) -> bool:
        """Whether the texts have to be the same, rather than merely compared."""
        return case == "steady" or self.dtype == "float32"

    def save_model(self, folder: Path) -> Path:
        """Write the model into a folder of its own below this one, if it is not there, and return that."""
        model = folder / f"{self.model}-{self.dtype}"
        if not model.exists():
            _SAVE[self.model](model, self.dtype)
        return model


REGIMES = (
    Regime("cpu", "eager", "float32", 48, "v1"),
    Regime("cuda", "eager", "bfloat16", 200),
    Regime("cuda", "piecewise", "bfloat16", 200),
    Regime("cuda", "graphs", "bfloat16", 200),
    Regime("cuda", "graphs", "bfloat16", 200, "v1"),
    Regime("cuda", "graphs", "float16", 200),
)
_HYBRIDS: tuple[ModelName, ...] = ("gemma3", "gpt-oss", "qwen3-next")
_GPU_MODES: tuple[tuple[Mode, Literal["v1", "v2"]], ...] = (("eager", "v2"), ("graphs", "v2"), ("graphs", "v1"))
HYBRID_REGIMES = (
    Regime("cpu", "eager", "float32", 48, "v1", "gemma3"),
    Regime("cpu", "eager", "float32", 48, "v1", "gpt-oss"),
    # vLLM's delta nets on a CPU know no other dtype
    Regime("cpu", "eager", "bfloat16", 48, "v1", "qwen3-next"),
    *(Regime("cuda", mode, "bfloat16", 96, runner, model) for model in _HYBRIDS for mode, runner in _GPU_MODES),
)


def _save_llama(folder: Path, dtype: str) -> Path:
    return save_tiny_llama(folder, dtype=getattr(torch, dtype))


def _save_gemma3(folder: Path, _: str) -> Path:
    return save_tiny_gemma3(folder)


def _save_gpt_oss(folder: Path, _: str) -> Path:
    return save_tiny_gpt_oss(folder)


def _save_qwen3_next(folder: Path, _: str) -> Path:
    # A state is no larger than a block of 32 tokens, so that vLLM's blocks are as large as ours: it cuts prompts where
    # blocks end, and the texts of a delta net depend on where
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    return save_tiny_qwen3_next(folder, linear_num_value_heads=1, linear_num_key_heads=1, **heads)


_SAVE: Mapping[str, Callable[[Path, str], Any]] = {
    "llama": _save_llama,
    "gemma3": _save_gemma3,
    "gpt-oss": _save_gpt_oss,
    "qwen3-next": _save_qwen3_next,
}
