"""Bugs at the border to vLLM: which tables, slots and lengths its attention gets, and what its scheduler said."""

from tests.mutations.mutation import Mutation

_DIR = "flashmemory_vllm/plugin/"
_TEST = "tests/unit/plugin/"

BORDER = (
    Mutation(
        "wrong group: attention of every group reads the first one's table",
        f"{_DIR}backends/common.py",
        "step.groups[self.group]",
        "step.groups[0]",
        f"{_TEST}test_backends.py::test_a_layer_attends_and_writes_with_its_own_group",
    ),
    Mutation(
        "wrong group: keys and values of every group go to the first one's slots",
        f"{_DIR}backends/common.py",
        "return self.runtime.slot_mapping(self.group, len(slot_mapping))",
        "pass",
        f"{_TEST}test_backends.py::test_a_layer_attends_and_writes_with_its_own_group",
    ),
    Mutation(
        "latents: rows in prefill are taken for the first ones of their batch",
        f"{_DIR}backends/latent.py",
        "first = attn_metadata.num_decode_tokens",
        "first = 0",
        f"{_TEST}test_latent_backend.py::test_rows_in_prefill_are_told_of_as_decode_rows_are",
    ),
    Mutation(
        "latents: a chunk of a prompt is attended to over a resident set, as decode rows are",
        f"{_DIR}backends/latent.py",
        "reorder_batch_threshold: int = 1",
        "reorder_batch_threshold: int = 512",
        f"{_TEST}test_latent_backend.py::test_each_group_has_a_backend_of_prefill_and_one_token_alone_is_decode",
    ),
    Mutation(
        "logical block ids reach attention",
        f"{_DIR}backends/common.py",
        "block_table_tensor=table.block_table,",
        "",
        f"{_TEST}test_backends.py::test_metadata_of_a_step_names_slots_and_short_lengths",
    ),
    Mutation(
        "attention reads past the slots of a row: its logical length is used",
        f"{_DIR}backends/common.py",
        "seq_lens=table.seq_lens,",
        "",
        f"{_TEST}test_backends.py::test_metadata_of_a_step_names_slots_and_short_lengths",
    ),
    Mutation(
        "a request that comes back after preemption decodes what it has yet to prefill",
        f"{_DIR}translate.py",
        "prompt_len + cached.num_output_tokens[index],",
        "prompt_len,",
        f"{_TEST}test_translate.py::test_a_request_that_v1_resumes_prefills_what_it_has_generated",
    ),
    Mutation(
        "wrong group: the blocks of a window are taken for ours",
        f"{_DIR}translate.py",
        "tuple(block_ids[self.managed])",
        "tuple(block_ids[0])",
        f"{_TEST}test_translate.py::test_blocks_of_the_managed_group_are_meant",
    ),
    Mutation(
        "wrong group: tokens of windows are written to our slots",
        f"{_DIR}compat.py",
        "by_group[managed])",
        "by_group[0])",
        "tests/integration/plugin/test_slot_translation.py::test_one_group_is_translated[RunnerV1-1]",
    ),
)
