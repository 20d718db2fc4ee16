"""Specification and CPU path of `row_lse`."""

import torch

from flashmemory_kernels.common.due_rows import padded_mass, scored_rows


def row_lse_naive(mass: torch.Tensor, rows: torch.Tensor, lse: torch.Tensor) -> None:
    """See `op.row_lse`."""
    indices = scored_rows(rows)
    lse.fill_(torch.inf)
    if len(indices):
        of_rows = padded_mass(mass, rows[indices]).logsumexp(3)
        lse[indices] = of_rows.masked_fill(of_rows == -torch.inf, torch.inf)
