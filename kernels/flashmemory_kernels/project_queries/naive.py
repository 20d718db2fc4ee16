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
    scaled = queries.float().flatten(1) / spread
    both = torch.cat((scaled, scaled.abs()), dim=-1)
    hidden = torch.einsum("af,afr->ar", both, down)
    hidden = functional.rms_norm(hidden, hidden.shape[-1:], eps=eps) * norm
    heads = torch.einsum("ar,arc->ac", hidden, up)
    gates = torch.einsum("ar,arh->ah", hidden, gate) + gate_bias
    return heads.view(*gates.shape, -1), gates
