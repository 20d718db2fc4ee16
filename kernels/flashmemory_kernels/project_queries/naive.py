"""Specification and CPU path of `project_queries`."""

import torch
from torch.nn import functional


def project_queries_naive(
    queries: torch.Tensor,
    spread: torch.Tensor,
    down: torch.Tensor,
    norm: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor,
    gate_bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `op.project_queries`."""
    scaled = queries.float().flatten(2) / spread
    both = torch.cat((scaled, scaled.abs()), dim=-1)
    hidden = torch.einsum("taf,afr->tar", both, down)
    hidden = functional.rms_norm(hidden, hidden.shape[-1:], eps=eps) * norm
    heads = torch.einsum("tar,arc->tac", hidden, up)
    gates = torch.einsum("tar,arh->tah", hidden, gate) + gate_bias
    return heads.view(*gates.shape, -1), gates
