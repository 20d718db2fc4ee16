"""A scenario becomes cells that give every engine the same prompts, in as few processes as can be."""

from typing import Any

from flashmemory_vllm.benchmark.cells import Cell, group_by_setup, make_cells
from flashmemory_vllm.benchmark.scenario import EngineName, Scenario

MODEL = {"model": "tiny"}


def make(engines: tuple[EngineName, ...] = ("stock", "flashmemory"), **changes: Any) -> dict[str, Cell]:
    fields = {"name": "m", "batch": 8, "prompt_tokens": 32768, "output_tokens": 20, **changes}
    scenario = Scenario.model_validate(
        {
            "name": "s",
            "why": "?",
            "engine": {"max_model_len": 40000, "kv_cache_memory_gib": 2.0, "max_num_batched_tokens": 8192},
            "flashmemory": {"tau_steps": 16},
            "measurements": [fields],
        }
    )
    return {cell.engine: cell for cell in make_cells(scenario, engines, MODEL)}


def test_engines_get_the_same_prompts_and_options_and_only_ours_our_section() -> None:
    cells = make(flashmemory={"selector": "exact"})
    assert cells["stock"].work == cells["flashmemory"].work
    assert cells["stock"].setup.llm == cells["flashmemory"].setup.llm
    assert cells["stock"].setup.ours is None
    assert cells["flashmemory"].setup.ours == {"tau_steps": 16, "selector": "exact"}
    assert cells["stock"].setup.llm["kv_cache_memory_bytes"] == 2 << 30


def test_the_ideal_is_stock_with_13_5_percent_of_the_tokens_in_the_same_process() -> None:
    cells = make(ideal=True)
    assert list(cells) == ["stock", "ideal", "flashmemory"]
    assert cells["ideal"].work.prompt_lens == (4424,) * 8
    assert make(("ideal",), batch=1, prompt_tokens=500_000)["ideal"].work.prompt_lens == (67_500,)
    groups = group_by_setup(list(cells.values()))
    assert [[cell.engine for cell in group] for group in groups] == [["stock", "ideal"], ["flashmemory"]]


def test_stock_may_differ_and_the_largest_length_is_left_to_vllm() -> None:
    stock = {"prompt_tokens": 1000, "engine": {"max_model_len": "largest", "kv_cache_memory_gib": None}}
    cells = make(stock=stock, ideal=True)
    assert cells["stock"].setup.llm["max_model_len"] == -1
    assert "kv_cache_memory_bytes" not in cells["stock"].setup.llm
    assert cells["stock"].work.prompt_lens == (1000,) * 8
    assert cells["ideal"].work.prompt_lens == (4424,) * 8
    assert cells["flashmemory"].setup.llm["max_model_len"] == 40000


def test_offloading_follows_stock_and_has_host_memory() -> None:
    cells = make(("stock", "offload"), stock={"engine": {"max_num_seqs": 3}}, engine={"kv_offloading_gib": 7.0})
    assert cells["offload"].setup.llm == {**cells["stock"].setup.llm, "kv_offloading_size": 7.0}


def test_requests_may_decode_on_while_others_are_in_prefill() -> None:
    # 32 chunks of 8,192 tokens, and one more for each prompt that ends inside of one
    assert make()["stock"].work.slack_tokens == 32 + 8
    assert make(batch=1)["stock"].work.slack_tokens == 0
    assert make(metric="prefill_tokens_per_s")["stock"].work.slack_tokens == 0


def test_measurements_have_different_prompts_unless_prefixes_are_kept() -> None:
    assert make()["stock"].work.streams != make(name="other")["stock"].work.streams
    assert make(keep_prefixes=True)["stock"].work.streams == make(keep_prefixes=True, name="n")["stock"].work.streams


def test_capture_sizes_reach_the_compilation_options() -> None:
    cells = make(engine={"cudagraph_capture_sizes": [4, 1], "llm": {"seed": 5}})
    assert cells["stock"].setup.llm["compilation_config"] == {"cudagraph_capture_sizes": [1, 4]}
    assert cells["stock"].setup.llm["seed"] == 5
