"""Inputs of `project_queries` shared by tests and benchmarks."""

from typing import NamedTuple

import torch


class ProjectCase(NamedTuple):
    """Hq query heads of D of T tokens in A layers, through a bottleneck of R, to H index heads of E."""

    num_layers: int
    num_query_heads: int
    head_dim: int
    rank: int
    num_heads: int
    width: int
    num_tokens: int = 1


class ProjectInputs(NamedTuple):
    """Arguments of the op."""

    queries: torch.Tensor
    spread: torch.Tensor
    down: torch.Tensor
    norm: torch.Tensor
    up: torch.Tensor
    gate: torch.Tensor
    gate_bias: torch.Tensor
    eps: float


CASES = (
    ProjectCase(1, num_query_heads=1, head_dim=1, rank=1, num_heads=1, width=1),
    ProjectCase(3, num_query_heads=4, head_dim=16, rank=12, num_heads=3, width=20),
    ProjectCase(2, num_query_heads=5, head_dim=64, rank=130, num_heads=17, width=8),
    ProjectCase(1, num_query_heads=9, head_dim=256, rank=5, num_heads=2, width=3),
    ProjectCase(2, num_query_heads=4, head_dim=16, rank=12, num_heads=3, width=20, num_tokens=7),
)

# Three anchor layers of an 8B model: the newest tokens of one row, of a quarter of 64, and of all of them.
BENCH_CASES = tuple(
    ProjectCase(3, num_query_heads=32, head_dim=128, rank=512, num_heads=32, width=128, num_tokens=num_tokens)
    for num_tokens in (1, 16, 64)
)


def make_inputs(case: ProjectCase, dtype: torch.dtype = torch.float32, device: str = "cpu") -> ProjectInputs:
    """Arguments of the op, with weights that keep every result at about one."""
    generator = torch.Generator(device).manual_seed(0)
    num_features = case.num_query_heads * case.head_dim

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(case.num_layers, *size, generator=generator, device=device)

    drawn = draw(case.num_tokens, case.num_query_heads, case.head_dim).transpose(0, 1)

    return ProjectInputs(
        queries=(3 * drawn).to(dtype),
        spread=3 + draw(num_features).clamp(-2, 2),
        down=draw(2 * num_features, case.rank) / (2 * num_features) ** 0.5,
        norm=1 + draw(case.rank) / 4,
        up=draw(case.rank, case.num_heads * case.width) / case.rank**0.5,
        gate=draw(case.rank, case.num_heads) / case.rank**0.5,
        gate_bias=draw(case.num_heads),
        eps=1e-6,
    )
