"""A Qwen3-shaped decoder in plain torch, for training; its state dict has the names of `Qwen3ForCausalLM`."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from flashmemory_vllm.evaluation import vocabulary as words

_QK_NORM_GAIN = 1.5


@dataclass(frozen=True, slots=True)
class ReferenceConfig:
    """Shape of the decoder, in the words of Qwen3's `config.json`."""

    vocab_size: int = words.NUM_WORDS
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 65536

    def to_dict(self) -> dict[str, int | float]:
        """The fields as a plain dictionary."""
        return asdict(self)

    @classmethod
    def load(cls, folder: Path) -> "ReferenceConfig":
        """Read the fields back from a `config.json` that the exporter wrote."""
        stored = json.loads((folder / "config.json").read_text())
        stored["rope_theta"] = stored["rope_parameters"]["rope_theta"]
        return cls(**{name: stored[name] for name in cls.__dataclass_fields__})


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a gain."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` `[..., dim]`."""
        return functional.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x` `[B, H, T, D]`, halves rotated against each other as Qwen3 does."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention with normalised queries and keys."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_dim, kv_dim = (
            config.num_attention_heads * self.head_dim,
            config.num_key_value_heads * self.head_dim,
        )
        self.q_proj = nn.Linear(config.hidden_size, query_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.o_proj = nn.Linear(query_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Mix `x` `[B, T, hidden]` over positions, given `cos` and `sin` `[T, head_dim]`."""
        heads = (*x.shape[:2], -1, self.head_dim)
        query = _rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), cos, sin)
        key = _rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), cos, sin)
        value = self.v_proj(x).view(heads).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(
            query.to(value.dtype), key.to(value.dtype), value, is_causal=True, enable_gqa=True
        )
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output


class MLP(nn.Module):
    """Gated feed-forward layer (SwiGLU)."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position of `x` `[B, T, hidden]` by itself."""
        output: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Next residual stream `[B, T, hidden]`."""
        mixed: Tensor = x + self.self_attn(self.input_layernorm(x), cos, sin)
        output: Tensor = mixed + self.mlp(self.post_attention_layernorm(mixed))
        return output


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", (config.rope_theta**-exponents).float(), persistent=False)

    def forward(self, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Hidden states `[B, T, hidden]` of token ids `[B, T]`, the residual stream kept in `dtype`."""
        angles = torch.outer(torch.arange(token_ids.shape[1], device=token_ids.device).float(), self.inv_freq)
        cos, sin = (torch.cat((part, part), dim=-1).to(dtype) for part in (angles.cos(), angles.sin()))
        x = self.embed_tokens(token_ids).to(dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        normed: Tensor = self.norm(x)
        return normed


class ReferenceModel(nn.Module):
    """The decoder with its output head."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw weights of unit-variance outputs; with the usual std of 0.02 it never leaves its plateau."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, 1 / math.sqrt(module.in_features), generator=generator)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 1.0, generator=generator)
            if name.endswith("down_proj"):
                module.weight.zero_()
            elif name.endswith(("q_norm", "k_norm")):
                module.weight.fill_(_QK_NORM_GAIN)

    def forward(self, token_ids: Tensor, positions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Logits `[B, P, vocab]` at `positions` `[P]` of token ids `[B, T]`, computed in `dtype`."""
        with torch.autocast(token_ids.device.type, dtype, enabled=dtype != torch.float32):
            logits: Tensor = self.lm_head(self.model(token_ids, dtype)[:, positions])
        return logits

    @classmethod
    def load(cls, folder: Path, device: str) -> "ReferenceModel":
        """Load an exported checkpoint, its weights widened to fp32 without change."""
        model = cls(ReferenceConfig.load(folder))
        model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
        return model.to(device).eval()
