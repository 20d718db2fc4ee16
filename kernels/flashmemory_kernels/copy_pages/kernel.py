"""Triton kernel of `copy_pages`.

A pinned host tensor has one address for CPU and GPU (unified addressing), so the kernel reads and writes it
like device memory: one launch moves any number of scattered pages, where a copy call per page costs about 8
us each. A fixed number of programs walks over all (page, chunk) pairs, so that a long copy leaves most
multiprocessors to the kernels of the model.
"""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, PLR0913, PLR0917

import torch
import triton
import triton.language as tl

# Pages are moved as 32-bit words: bit exact for every dtype. Four words a thread make one 16-byte access.
WORD_BYTES = 4
CHUNK_WORDS = 2048
NUM_WARPS = 4
NUM_PROGRAMS = 32


# The number of pages differs from call to call, and so does the place where a part of a list of ids begins:
# neither must compile a kernel of its own.
@triton.jit(do_not_specialize=["num_pages"], do_not_specialize_on_alignment=["p_source_ids", "p_target_ids"])
def copy_pages_kernel(
    p_source, p_source_ids, p_target, p_target_ids,
    stride_source, stride_target, num_pages, num_words,
    HAS_SOURCE_IDS: tl.constexpr, HAS_TARGET_IDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Walk over (page, chunk) pairs with a stride of the grid."""
    chunks_per_page = tl.cdiv(num_words, CHUNK)
    for i_task in range(tl.program_id(0), num_pages * chunks_per_page, tl.num_programs(0)):
        i_page = i_task // chunks_per_page
        i_word = (i_task % chunks_per_page) * CHUNK + tl.arange(0, CHUNK)
        m_word = i_word < num_words
        source_page = i_page.to(tl.int64)
        if HAS_SOURCE_IDS:
            source_page = tl.load(p_source_ids + i_page)
        target_page = i_page.to(tl.int64)
        if HAS_TARGET_IDS:
            target_page = tl.load(p_target_ids + i_page)
        words = tl.load(p_source + source_page * stride_source + i_word, m_word)
        tl.store(p_target + target_page * stride_target + i_word, words, m_word)


def copy_pages_triton(
    source: torch.Tensor,
    source_ids: torch.Tensor | None,
    target: torch.Tensor,
    target_ids: torch.Tensor | None,
    num_programs: int = NUM_PROGRAMS,
) -> None:
    """See `op.copy_pages`; pages must be whole 32-bit words."""
    num_pages = next(len(pages) for pages in (source_ids, target_ids, source) if pages is not None)
    source_words, target_words = source.view(torch.int32), target.view(torch.int32)
    if num_pages == 0:
        return
    copy_pages_kernel[(num_programs,)](
        source_words, source_words if source_ids is None else source_ids,
        target_words, target_words if target_ids is None else target_ids,
        source_words.stride(0), target_words.stride(0), num_pages, source_words.shape[1],
        HAS_SOURCE_IDS=source_ids is not None, HAS_TARGET_IDS=target_ids is not None,
        CHUNK=CHUNK_WORDS, num_warps=NUM_WARPS,
    )  # fmt: skip
