"""A plan names each cell once, dense attention only where it can differ, and says what is wrong with it."""

from pathlib import Path

import pytest

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.accuracy import Cell
from flashmemory_vllm.evaluation.accuracy_plan import CellGroup, cells_of, load_plan
from flashmemory_vllm.evaluation.accuracy_rows import Setting
from flashmemory_vllm.evaluation.tasks import TASK_NAMES
from flashmemory_vllm.own_options import OwnOptions
from tests.docs.pages import ROOT

PLANS = sorted((ROOT / "configs" / "accuracy").glob("*.yaml"))


def without_index(setting: Setting) -> float:
    """The resident ratio of a selector without index keys."""
    return setting.ratio


def group(**fields: object) -> CellGroup:
    return CellGroup.model_validate({"selectors": ["exact"], "tokens": [1024], "tasks": ["late"]} | fields)


def test_lists_are_combined() -> None:
    cells = list(
        group(ratios=[0.1, 0.2], taus=[4, 8], groups=[1, 3], anchor_layers=[None, [2, 0]]).cells(None, without_index)
    )
    assert len(cells) == len(set(cells)) == 16
    assert cells[-1] == Cell(Setting("exact", 8, 0.2, 3, (0, 2)), "late", 1024, 200, 64)


def test_dense_attention_is_asked_once_for_each_load() -> None:
    cells = group(selectors=["exact", "full"], ratios=[0.1, 0.2], taus=[4, 8], tokens=[600, 1024], batches=[1, 2])
    dense = [cell for cell in cells.cells(None, without_index) if cell.setting.selector == "full"]
    assert {cell.setting for cell in dense} == {Setting("full", 4, 1.0, 1)}
    assert [(cell.tokens, cell.batch) for cell in dense] == [(600, 1), (600, 2), (1024, 1), (1024, 2)]


def test_all_tasks_are_the_default() -> None:
    cells = CellGroup(selectors=["exact"], tokens=[1024]).cells(None, without_index)
    assert [cell.task for cell in cells] == list(TASK_NAMES)


def test_cells_of_several_groups_are_measured_once() -> None:
    both = cells_of([group(taus=[4, 8]), group(taus=[8, 16])], None, without_index)
    assert [cell.setting.tau for cell in both] == [4, 8, 16]


def test_a_device_share_gives_each_selector_the_ratio_that_its_index_leaves() -> None:
    index = {"exact": 0.25, "streaming": 0.0}
    shares = group(selectors=["exact", "streaming", "full"], device_shares=[0.125, 0.5])
    cells = shares.cells(None, lambda setting: setting.ratio - index[setting.selector])
    assert {(cell.setting.selector, cell.setting.device_share, cell.setting.ratio) for cell in cells} == {
        ("full", None, 1.0),
        ("exact", 0.125, -0.125),
        ("exact", 0.5, 0.25),
        ("streaming", 0.125, 0.125),
        ("streaming", 0.5, 0.5),
    }


def test_what_the_first_selections_read_is_a_setting_of_its_own() -> None:
    cells = group(query_windows=[None, 16], opening_steps=[2]).cells(None, without_index)
    options = [FlashMemoryConfig.from_additional_config({"flashmemory": cell.setting.all_options()}) for cell in cells]
    assert [(option.query_window, option.opening_steps) for option in options] == [(None, 2), (16, 2)]


def test_further_options_are_part_of_a_setting_and_tau_is_what_suits_the_selector() -> None:
    plain = {"memory_decay": 0, "index_dtype": "auto"}
    cells = group(selectors=["full", "exact", "streaming"], taus=[None, 8], options=plain).cells(None, without_index)
    settings = [cell.setting for cell in cells]
    assert [(one.selector, one.tau) for one in settings] == [
        *(("full", 16), ("exact", 4), ("streaming", 16)),
        *(("exact", 8), ("streaming", 8)),
    ]
    own = FlashMemoryConfig.from_additional_config({"flashmemory": settings[1].all_options()}).own
    assert own == OwnOptions(4, 0, 0.3, 0.5, 1.0, "auto")
    assert (settings[0].options, settings[1].options) == ((), (("index_dtype", "auto"), ("memory_decay", 0)))


def test_a_fallback_is_a_setting_of_its_own() -> None:
    cells = group(fallback_shares=[None, 0.3], score_thresholds=[0.01]).cells(None, without_index)
    assert [cell.setting.all_options()["dense_fallback_share"] for cell in cells] == [None, 0.3]
    trained = group(selectors=["neural", "full"], fallback_shares=[0.3]).cells("x", without_index)
    assert [cell.setting.fallback_share for cell in trained] == [None, 0.3]


def test_an_indexer_goes_to_the_selector_that_takes_one() -> None:
    groups = [group(selectors=["neural", "h2o"]), group(selectors=["neural"], indexer="own", anchor_layers=[[1]])]
    assert [
        (cell.setting.selector, cell.setting.indexer, cell.setting.anchors)
        for cell in cells_of(groups, "x", without_index)
    ] == [
        ("neural", "x", None),
        ("h2o", None, None),
        ("neural", "own", (1,)),
    ]
    with pytest.raises(ConfigError, match="--indexer is not given"):
        cells_of(groups, None, without_index)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_every_published_plan_asks_for_what_our_configuration_allows(path: Path) -> None:
    cells = cells_of(load_plan(path).cells, "owner/indexer", without_index)
    assert cells
    for setting in {cell.setting for cell in cells}:
        FlashMemoryConfig.model_validate(setting.all_options())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("why: x\ncells: [{selectors: [exact], tokens: [1024], tasks: [riddle]}]", "cells.0.tasks.0: "),
        ("why: x\ncells: [{selectors: [best], tokens: [1024]}]", "cells.0.selectors.0"),
        ("why: x\ncells: [{selectors: [exact], tokens: []}]", "cells.0.tokens: "),
        ("why: x\ncells: [{selectors: [exact], tokens: [1024], ratios: [0]}]", "cells.0.ratios.0: "),
        ("why: x\ncells: [{selectors: [exact], tokens: [1024], tau: 4}]", "cells.0.tau: "),
        (
            "why: x\ncells: [{selectors: [exact], tokens: [1024], ratios: [0.1], device_shares: [0.4]}]",
            "device_shares are [0.4] and ratios [0.1]: allowed is one of them",
        ),
        (
            "why: x\ncells: [{selectors: [neural, h2o], tokens: [1024], fallback_shares: [null, 0.3]}]",
            "fallback_shares are [0.3] for h2o, whose own scores have no threshold",
        ),
        ("cells: []", "why: Field required"),
        ("- 1", "file: "),
        ("{", "cannot be read"),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        load_plan(path)
    assert str(refusal.value).startswith(f"--plan: {path}")
    assert said in str(refusal.value)


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        load_plan(tmp_path / "none.yaml")
