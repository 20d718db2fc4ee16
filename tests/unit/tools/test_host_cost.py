"""The measurement of host time runs the real runtime, and lists change sets in it."""

import pytest

from tests.tools import host_cost


def test_every_part_is_measured_and_sets_change(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_cost, "WARM_STEPS", 4)
    assert host_cost.main(["--rows", "3", "--tokens", "2000", "--tau", "2", "--steps", "20", "--changes", "1"]) == 0
    title, _, *lines = capsys.readouterr().out.splitlines()
    assert float(title.split(": ")[1].split()[0]) > 0.3
    told = {name.strip(): float(median) for name, _, median, _ in (line.rsplit(maxsplit=3) for line in lines)}
    assert told.keys() == {part for part, *_ in host_cost.PARTS} | {"all selections", "all"}
    assert min(told.values()) >= 0
    assert told["all"] >= told["plan"] + told["choose"] > 0
