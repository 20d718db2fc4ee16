"""The schema: defaults serve, and a wrong option is told with its key, its value and what is allowed."""

import pytest
from pydantic import ValidationError

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.config_text import describe_allowed
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.own_options import OwnOptions


def _read(**options: object) -> FlashMemoryConfig:
    return FlashMemoryConfig.from_additional_config({"flashmemory": options})


def test_no_option_is_required() -> None:
    assert FlashMemoryConfig.from_additional_config({}) == FlashMemoryConfig()


def test_sections_of_others_are_left_alone() -> None:
    given = {"other_plugin": {"x": 1}, "flashmemory": {"tau_steps": 8}}
    assert FlashMemoryConfig.from_additional_config(given).tau_steps == 8


def test_given_options_replace_defaults() -> None:
    config = _read(resident_ratio=1, selector="bounds", anchor_layers=[0, 5], host_memory_gib=4)
    assert (config.resident_ratio, config.selector, config.anchor_layers) == (1.0, "bounds", (0, 5))
    assert config.host_memory_gib == 4.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resident_ratio": 0}, "flashmemory.resident_ratio is 0: allowed is a number > 0 and <= 1"),
        ({"resident_ratio": 1.01}, "flashmemory.resident_ratio is 1.01: allowed is a number > 0 and <= 1"),
        ({"resident_ratio": "0.2"}, "flashmemory.resident_ratio is '0.2': allowed is a number > 0 and <= 1"),
        ({"tau_steps": True}, "flashmemory.tau_steps is True: allowed is unset or an integer >= 1"),
        ({"device_slots": 1}, "flashmemory.device_slots is 1: allowed is unset or an integer >= 2"),
        (
            {"host_memory_gib": float("nan")},
            "flashmemory.host_memory_gib is nan: allowed is unset or a number > 0",
        ),
        ({"pin_host_memory": 1}, "flashmemory.pin_host_memory is 1: allowed is true or false"),
        ({"mode": "never"}, "flashmemory.mode is 'never': allowed is one of always, pressure"),
        (
            {"prefetch_mib_per_step": 0},
            "flashmemory.prefetch_mib_per_step is 0: allowed is an integer >= 1",
        ),
        ({"aggregate": "sum"}, "flashmemory.aggregate is 'sum': allowed is one of max, mean"),
        (
            {"anchor_layers": [1, -2]},
            "flashmemory.anchor_layers[1] is -2: allowed is unset or a list of layer indices >= 0",
        ),
        (
            {"resident_ration": 0.2},
            (
                "flashmemory.resident_ration is no option (given: 0.2): closest is "
                "flashmemory.resident_ratio, a number > 0 and <= 1"
            ),
        ),
        (
            {"score_threshold": -0.5},
            "flashmemory.score_threshold is -0.5: allowed is unset or a number >= 0",
        ),
        (
            {"selector": "streaming", "hysteresis": 1.0},
            (
                "flashmemory.hysteresis is 1.0, but flashmemory.selector 'streaming' does not score by shares of "
                "attention: allowed with mean, bounds, exact, h2o, neural"
            ),
        ),
        (
            {"selector": "h2o", "memory_decay": 0.5},
            (
                "flashmemory.memory_decay is 0.5, but flashmemory.selector 'h2o' has no score that fades: allowed with "
                "mean, bounds, exact"
            ),
        ),
        (
            {"selector": "bounds", "index_dtype": "fp8"},
            (
                "flashmemory.index_dtype is 'fp8', but flashmemory.selector 'bounds' keeps no keys as they are: "
                "allowed with exact, h2o, neural"
            ),
        ),
        ({"index_dtype": "int8"}, "flashmemory.index_dtype is 'int8': allowed is unset or one of auto, fp8"),
        (
            {"dense_fallback_share": 0.2},
            (
                "flashmemory.dense_fallback_share is 0.2, but nothing says which blocks are worth a slot: allowed with "
                "flashmemory.score_threshold or flashmemory.indexer"
            ),
        ),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _read(**options)
    assert str(caught.value) == message


def test_every_wrong_option_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"flashmemory\.seed is -1.*; flashmemory\.tau is no option"):
        _read(seed=-1, tau=3)


def test_a_section_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"flashmemory is 0\.2: allowed is a mapping of options"):
        FlashMemoryConfig.from_additional_config({"flashmemory": 0.2})


def test_tau_is_as_asked_for_or_as_trained_or_the_selectors_own() -> None:
    trained = _read(indexer="some/where", dense_fallback_share=0.2)
    assert (trained.selector, trained.tau(64)) == ("neural", 64)
    assert _read(tau_steps=8, indexer="some/where").tau(64) == 8
    assert (_read(selector="exact").tau(None), _read(selector="h2o").tau(None), _read(tau_steps=9).tau(None)) == (
        4,
        16,
        9,
    )


def test_each_selector_has_options_of_its_own() -> None:
    assert _read(selector="exact").own == OwnOptions(4, 0.9, 0.3, 0.5, 1.0, "fp8")
    for options in ({"selector": "h2o"}, {"selector": "streaming"}, {"selector": "bounds"}):
        assert _read(**options).own == OwnOptions(16, 0.0, 0.0, 0.0, 0.0, "auto")
    # Of keys that an indexer may have beside its codes
    assert _read(indexer="some/where").own == OwnOptions(16, 0.0, 0.0, 0.0, 0.0, "fp8")
    plain = OwnOptions()._asdict()
    assert _read(selector="exact", **plain).own == OwnOptions(16, 0.0, 0.0, 0.0, 0.0, "auto")
    assert _read(selector="bounds", memory_decay=0.5).own == OwnOptions(16, 0.5, 0.0, 0.0, 0.0, "auto")


def test_config_stays_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        FlashMemoryConfig().seed = 1


@pytest.mark.parametrize("name", FlashMemoryConfig.model_fields)
def test_every_option_is_described(name: str) -> None:
    field = FlashMemoryConfig.model_fields[name]
    assert field.description
    assert describe_allowed(field)


def test_a_revision_needs_an_indexer() -> None:
    message = r"flashmemory\.indexer_revision is 'v1', but flashmemory\.indexer is unset: allowed with an indexer"
    with pytest.raises(ConfigError, match=message):
        FlashMemoryConfig.from_additional_config({"flashmemory": {"indexer_revision": "v1"}})
