"""Forced tokens under both of vLLM's runners: only rows that force are touched, and each follows its own text."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

from flashmemory_vllm.evaluation import target
from flashmemory_vllm.plugin.forced_tokens import ARGUMENT, ForcedTokens

VOCABULARY, LONGEST = 11, 6
CONFIG: Any = SimpleNamespace(
    model_config=SimpleNamespace(get_vocab_size=lambda: VOCABULARY, max_model_len=LONGEST),
)


def params(*forced: int) -> SamplingParams:
    return SamplingParams(extra_args={ARGUMENT: list(forced)} if forced else None)


def written(logits: torch.Tensor) -> list[int]:
    return logits.argmax(-1).tolist()


def logits_of(num_rows: int) -> torch.Tensor:
    """Without a processor every row writes token 10."""
    return torch.arange(VOCABULARY, dtype=torch.float32).repeat(num_rows, 1)


def v1(*added: tuple[int, SamplingParams, list[int]]) -> ForcedTokens:
    processor = ForcedTokens(CONFIG, torch.device("cpu"), False)
    processor.update_state(update(added=[(row, given, None, done) for row, given, done in added]))
    return processor


def update(removed: Any = (), added: Any = (), moved: Any = ()) -> BatchUpdate:
    return BatchUpdate(batch_size=4, removed=list(removed), added=list(added), moved=list(moved))


def test_the_commands_name_what_the_plugin_has() -> None:
    assert f"{ForcedTokens.__module__}:{ForcedTokens.__qualname__}" == target.FORCED_TOKENS
    assert target.FORCED_ARGUMENT == ARGUMENT
    assert issubclass(ForcedTokens, V1LogitsProcessor)
    assert issubclass(ForcedTokens, V2LogitsProcessor)


def test_v1_rows_follow_their_texts_to_the_end() -> None:
    generated: list[int] = []
    processor = v1((0, params(3, 5), generated), (1, params(), []))
    for expected in ([3, 10], [5, 10], [10, 10]):
        logits = processor.apply(logits_of(2))
        assert written(logits) == expected
        generated.append(expected[0])


def test_v1_rows_may_move_swap_and_be_taken_over() -> None:
    processor = v1((0, params(1), []), (1, params(2), []), (2, params(), []))
    processor.update_state(update(moved=[(0, 1, MoveDirectionality.SWAP), (1, 2, MoveDirectionality.UNIDIRECTIONAL)]))
    assert written(processor.apply(logits_of(3))) == [2, 10, 1]
    processor.update_state(update(removed=[0], added=[(2, params(), None, [])]))
    assert written(processor.apply(logits_of(3))) == [10, 10, 10]
    processor.update_state(None)


def test_v2_rows_follow_their_positions() -> None:
    prompt_lens = torch.tensor([4, 2, 7])
    states = SimpleNamespace(max_num_reqs=3, device="cpu", prompt_len=SimpleNamespace(gpu=prompt_lens))
    processor = ForcedTokens(CONFIG, states)
    untouched = logits_of(1)
    assert processor.apply(untouched, SimpleNamespace()) is untouched
    assert processor.add_request(2, params(6, 7, 8))
    assert processor.add_request(0, params(3))
    assert not processor.add_request(1, params())
    # Rows are in any order; slot 0 writes its only token, then samples; slot 2 still prefills, then writes
    for positions, expected in (([3, 5, 1], [3, 10, 10]), ([4, 6, 1], [10, 6, 10]), ([5, 8, 1], [10, 8, 10])):
        ctx = SimpleNamespace(
            expanded_idx_mapping=torch.tensor([0, 2, 1], dtype=torch.int32), pos=torch.tensor(positions)
        )
        assert written(processor.apply(logits_of(3), ctx)) == expected
    # The slot's next tenant forces nothing
    assert not processor.add_request(2, params())
    ctx = SimpleNamespace(expanded_idx_mapping=torch.tensor([2]), pos=torch.tensor([6]))
    logits = processor.apply(logits_of(1), ctx)
    assert torch.equal(logits, logits_of(1))


@pytest.mark.parametrize("unknown", [VOCABULARY, 1 << 40])
def test_a_token_that_the_model_does_not_have_ends_the_text_and_not_the_engine(unknown: int) -> None:
    generated: list[int] = []
    first = v1((0, params(3, unknown, 4), generated))
    states = SimpleNamespace(max_num_reqs=1, device="cpu", prompt_len=SimpleNamespace(gpu=torch.tensor([2])))
    second = ForcedTokens(CONFIG, states)
    second.add_request(0, params(3, unknown, 4))
    for position, expected in ((1, 3), (2, 10), (3, 10)):
        ctx = SimpleNamespace(expanded_idx_mapping=torch.tensor([0]), pos=torch.tensor([position]))
        assert written(first.apply(logits_of(1))) == written(second.apply(logits_of(1), ctx)) == [expected]
        generated.append(expected)


def test_a_text_takes_no_more_device_memory_than_a_request_can_have_tokens() -> None:
    states = SimpleNamespace(max_num_reqs=3, device="cpu", prompt_len=SimpleNamespace(gpu=torch.zeros(3)))
    processor = ForcedTokens(CONFIG, states)
    processor.add_request(0, params(*[1] * 1000))
    assert processor._tokens.shape == (3, LONGEST)


@pytest.mark.parametrize("given", ["12", [1.5], [-1], {"a": 1}])
def test_other_arguments_are_refused_before_they_reach_the_engine(given: Any) -> None:
    with pytest.raises(ValueError, match=f"{ARGUMENT}: .* given, allowed: a list of token ids"):
        ForcedTokens.validate_params(SamplingParams(extra_args={ARGUMENT: given}))
    ForcedTokens.validate_params(params(1, 2))
    ForcedTokens.validate_params(params())
