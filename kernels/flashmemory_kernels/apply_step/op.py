"""Public op `apply_step`."""

import torch

from flashmemory_kernels.apply_step.naive import apply_step_naive
from flashmemory_kernels.apply_step.tables import PlaceTables, StepCounts
from flashmemory_kernels.common import expect_device, expect_dtype, expect_shape, runs_kernel


def apply_step(packed: torch.Tensor, counts: StepCounts, logical_lens: torch.Tensor, tables: PlaceTables) -> None:
    """Apply a step's changes to the tables of its places, then write the rows of its batch, from one upload.

    `packed` is, one behind the other, `rows [num_rows, 3 + G]`, `runs [num_runs, 4]`, `edits [num_edits, 3]` and
    whatever the runs point to:

    - a row: its place, -1 in padding; index of its first token in the batch; its tokens in the batch; then per layer
      group the tokens that the table leaves out, a multiple of the block size. Of a group whose length is to be 0, as
      attention over it is computed elsewhere, -1 less that number. Rows come in the order of their tokens, padding last
      and without tokens.
    - an edit: table, column, value. Table `g * P + p` is `entries[g, p]`, table `G * P + p` is `block_ids[p]`.
    - a run: table, column, where in `packed` its values begin, how many they are.

    Changes hit distinct columns: of several to one column any may win. Mutates all tensors of `tables`: for each row r
    `block_table[g, r]` up to its length, `seq_lens[g, r] = logical_lens[r]` less what is left out, and the slots and
    query rows of its tokens, the last of which is the last of the logical length. Only the newest Q tokens of a row
    keep their queries. Tokens behind the last row's have slot and query row -1, up to `num_tokens`. Padding rows have
    length 0 and keep the table of the step before.

    What `packed` says is trusted: checking it would stall the device.

    Args:
        packed: int32 [n].
        counts: of its parts.
        logical_lens: int32 [num_rows] at least, tokens of each row after the step.
        tables: what is changed.

    Raises:
        ValueError: shape, dtype or device do not match, or `packed` is shorter than its parts.
    """
    num_groups, max_rows, _ = tables.block_table.shape
    expect_shape("packed", packed, (None,))
    expect_shape("logical_lens", logical_lens, (None,))
    for name, tensor in (("packed", packed), ("logical_lens", logical_lens)):
        expect_dtype(name, tensor, torch.int32)
        expect_device(name, tensor, tables.entries.device)
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    for what, given, most in (
        ("rows", counts.num_rows, min(max_rows, len(logical_lens))),
        ("tokens", counts.num_tokens, tables.slot_mapping.shape[1]),
        ("elements in packed", counts.num_elems(num_groups), len(packed)),
    ):
        if given > most:
            raise ValueError(f"counts: expected at most {most} {what}, got {given}")
    if runs_kernel(packed):
        from flashmemory_kernels.apply_step.kernel import apply_step_triton

        apply_step_triton(packed, counts, logical_lens, tables)
    else:
        apply_step_naive(packed, counts, logical_lens, tables)
