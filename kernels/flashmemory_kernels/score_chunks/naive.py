"""Specification and CPU path of `score_chunks`, and the number format of the codes."""

import torch

CODE_DTYPE = torch.float8_e4m3fn
LARGEST_CODE = torch.finfo(CODE_DTYPE).max
# A row of zeros keeps a scale that can be divided by.
SMALLEST_SCALE = 1e-12
# Elements of the gathered codes that are held in float32 at once: 64 MiB.
CHUNK_ELEMS = 1 << 24


def quantise_codes(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows to fp8 with a scale each, so that the largest element of a row keeps its place.

    Args:
        rows: [..., E].

    Returns:
        Codes, fp8 e4m3 [..., E], and scales, float32 [...]; a row is its code times its scale.
    """
    rows = rows.float()
    scales = (rows.abs().amax(-1) / LARGEST_CODE).clamp(min=SMALLEST_SCALE)
    # The quotient may be above the largest code by a rounding error, and would then become NaN.
    codes = (rows / scales.unsqueeze(-1)).clamp(-LARGEST_CODE, LARGEST_CODE).to(CODE_DTYPE)
    return codes, scales


def dequantise_codes(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 rows [..., E] that codes and scales stand for."""
    return codes.float() * scales.unsqueeze(-1)


def score_chunks_naive(
    query: torch.Tensor,
    gates: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    block_ids: torch.Tensor,
    bias: torch.Tensor,
    slope: torch.Tensor,
    chunk_elems: int = CHUNK_ELEMS,
) -> torch.Tensor:
    """See `op.score_chunks`; walks over the blocks in chunks so that temporaries stay bounded."""
    num_tokens, num_layers, num_heads, width = query.shape
    logits = torch.empty(num_tokens, num_layers, len(block_ids), dtype=torch.float32, device=query.device)
    # Rows are gathered as bytes: indexing does not know fp8 on every device.
    rows = codes.view(torch.uint8)
    chunk = max(1, chunk_elems // (num_layers * max(width, num_tokens * num_heads)))
    for start in range(0, len(block_ids), chunk):
        ids = block_ids[start : start + chunk]
        gathered = rows.index_select(1, ids).view(CODE_DTYPE).float()  # [A, m, E]
        products = torch.einsum("qahe,ame->qahm", query.float(), gathered).relu()
        summed = torch.einsum("qah,qahm->qam", gates.float(), products)
        logits[..., start : start + chunk] = summed * scales.index_select(1, ids)
    distance = torch.arange(len(block_ids), 0, -1, dtype=torch.float32, device=query.device)
    return logits + bias.float().unsqueeze(-1) + slope.float().unsqueeze(-1) * distance.log()
