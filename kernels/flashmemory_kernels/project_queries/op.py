"""Public op `project_queries`."""

import torch

from flashmemory_kernels.common import expect_device, expect_dtype, expect_shape, runs_kernel
from flashmemory_kernels.project_queries.naive import project_queries_naive


def project_queries(
    queries: torch.Tensor,
    spread: torch.Tensor,
    down: torch.Tensor,
    norm: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor,
    gate_bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index heads and their gates in each layer, through a bottleneck of R with an RMSNorm.

    `x = queries / spread`, `hidden = rms_norm([x, |x|] down) * norm`, `heads = hidden up`,
    `gates = hidden gate + gate_bias`.

    It is bound by reading the weights, which happens once however many tokens there are. One token has kernels of its
    own; the products of several are those of a library, in float32.

    Args:
        queries: [T, A, Hq, D], one query per token, layer and head; F = Hq * D.
        spread: float32 [A, F], positive.
        down: float32 [A, 2 * F, R].
        norm: float32 [A, R].
        up: float32 [A, R, H * E].
        gate: float32 [A, R, H].
        gate_bias: float32 [A, H].
        eps: added to the mean square.

    Returns:
        Heads, float32 [T, A, H, E], and gates, float32 [T, A, H].

    Raises:
        ValueError: shape, dtype, device or strides do not match.
    """
    expect_shape("queries", queries, (None, None, None, None))
    num_layers, num_features = queries.shape[1], queries.shape[2] * queries.shape[3]
    expect_shape("spread", spread, (num_layers, num_features))
    expect_shape("down", down, (num_layers, 2 * num_features, None))
    rank = down.shape[2]
    expect_shape("norm", norm, (num_layers, rank))
    expect_shape("up", up, (num_layers, rank, None))
    expect_shape("gate", gate, (num_layers, rank, None))
    expect_shape("gate_bias", gate_bias, (num_layers, gate.shape[2]))
    if up.shape[2] % gate.shape[2]:
        raise ValueError(f"up: expected a multiple of {gate.shape[2]} columns, got {up.shape[2]}")
    weights = {"spread": spread, "down": down, "norm": norm, "up": up, "gate": gate, "gate_bias": gate_bias}
    for name, tensor in weights.items():
        expect_dtype(name, tensor, torch.float32)
        expect_device(name, tensor, queries.device)
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    arguments = queries, spread, down, norm, up, gate, gate_bias, eps
    if runs_kernel(queries) and len(queries) == 1:
        from flashmemory_kernels.project_queries.kernel import project_queries_triton

        return project_queries_triton(*arguments)
    return project_queries_naive(*arguments)
