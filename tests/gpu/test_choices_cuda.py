"""A choice on a GPU makes the sets that a CPU makes of the same keys and queries, without a wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashmemory_vllm.indexer import IndexGeometry, Selector, create_selector
from tests.helpers.indexers import save_untrained
from tests.unit.runtime.choosing import BLOCK, HQ, D, World

POLICIES: dict[str, dict[str, Any]] = {
    "exact": {"memory_decay": 0.9},
    "exact fp8": {"memory_decay": 0.9, "question_share": 0.3, "index_dtype": "fp8"},
    "bounds": {},
    "mean": {"aggregate": "mean"},
    "h2o": {},
    "streaming": {},
    "random": {"seed": 3},
    "neural": {},
    "neural that forecasts": {},
}


def without_waiting(choose: Callable[..., None]) -> Callable[..., None]:
    """The same, and an error if the host waits for the device meanwhile."""

    def watched(*arguments: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            choose(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watched


@pytest.mark.parametrize("policy", POLICIES)
def test_sets_are_those_of_a_cpu(
    policy: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = policy.partition(" ")[0], POLICIES[policy]
    if name == "neural":
        path = tmp_path_factory.mktemp("indexer") / "indexer.safetensors"
        sizes: dict[str, Any] = {
            "num_layers": 6,
            "num_query_heads": HQ,
            "head_dim": D,
            "block_size": BLOCK,
            "chunk_size": 4,
        }
        sizes |= {"memory_decays": (0.0, 0.9) if "forecasts" in policy else (), "forecast_threshold": 0.0}
        options = {"indexer": str(save_untrained(path, anchor_layers=(1, 3, 4), threshold=0.0, **sizes))}

    def make(geometry: IndexGeometry) -> Selector:
        return create_selector(name, geometry, **options)

    worlds = [World(make, (1, 0, 1), num_kept=5, device=device) for device in ("cpu", "cuda")]
    found = []
    for world in worlds:
        monkeypatch.setattr(world.queue, "choose", without_waiting(world.queue.choose))
        requests = {"a": world.start("a", 2, prompt_len=93, want=4), "b": world.start("b", 0, prompt_len=75, want=3)}
        world.choose(*map(world.asked, requests.values()), requests=requests, window=4)
        for step in range(12):
            rows = []
            for offset, request in enumerate(requests.values()):
                began = world.grow(request, 1)
                if (step + offset) % 3 == 0:
                    rows.append(world.asked(request, at_once=step % 2 == 0))
                elif began:
                    rows.append(world.asked(request, scored=False, cap=0))
            world.choose(*rows, requests=requests)
        world.move(requests["a"], 3)
        world.choose(world.asked(requests["a"]), requests=requests, window=4)
        for request in requests.values():
            assert world.device_sets(request) == request.chosen
        known = [world.state.places.memory[:, :, one.place, : one.num_full].cpu() for one in requests.values()]
        found.append(([one.sets for one in requests.values()], known))
    (expected, remembered), (sets, memory) = found
    assert sets == expected
    for mine, theirs in zip(memory, remembered, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
