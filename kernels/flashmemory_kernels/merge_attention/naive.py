"""Specification and CPU path of `merge_attention`."""

import torch


def merge_attention_naive(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `op.merge_attention`."""
    out, lse = or_new(out, lse, out_a)
    # FlashAttention 2 writes +inf for a row without keys, everybody else -inf: both mean empty.
    lse_a = lse_a.masked_fill(lse_a.isinf(), -torch.inf)
    lse_b = lse_b.masked_fill(lse_b.isinf(), -torch.inf)
    top = torch.maximum(lse_a, lse_b)
    both_empty = top.isinf()
    # Two empty parts would give -inf - -inf = NaN: subtract a finite number instead.
    top = top.masked_fill(both_empty, 0.0)
    # Weights relative to the larger part, then normalised: exp(lse_a - lse) would lose the digits that a
    # large lse has no room for.
    weight_a, weight_b = (lse_a - top).exp(), (lse_b - top).exp()
    total = (weight_a + weight_b).masked_fill(both_empty, 1.0)
    out.copy_((_weighted(out_a, weight_a) + _weighted(out_b, weight_b)) / _per_row(total))
    lse.copy_((top + total.log()).masked_fill(both_empty, -torch.inf))
    return out, lse


def or_new(out: torch.Tensor | None, lse: torch.Tensor | None, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the result goes; what is not given is made like `like` [T, H, D]."""
    num_tokens, num_heads, _ = like.shape
    return (
        torch.empty_like(like, memory_format=torch.contiguous_format) if out is None else out,
        torch.empty(num_heads, num_tokens, dtype=torch.float32, device=like.device) if lse is None else lse,
    )


def _weighted(out: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`out` [T, H, D] times weight [H, T]; an empty part counts 0 even where its buffer holds NaN."""
    return (out.float() * _per_row(weight)).masked_fill(_per_row(weight) == 0, 0.0)


def _per_row(weight: torch.Tensor) -> torch.Tensor:
    """[H, T] -> [T, H, 1]."""
    return weight.transpose(0, 1).unsqueeze(-1)
