"""Findings as a table and as JSON, and the exit code they lead to."""

import pytest

from flashmemory_vllm.doctor.finding import Finding, Status, as_json, as_table, exit_code

FINDINGS = [
    Finding("vLLM", "ok", "0.32.0"),
    Finding("host link", "warn", "3.1 GB/s to the device", "see that the card has 16 lanes"),
]


@pytest.mark.parametrize(("statuses", "code"), [([], 0), (["ok", "warn"], 0), (["ok", "fail", "ok"], 1)])
def test_only_a_failed_check_changes_the_exit_code(statuses: list[Status], code: int) -> None:
    assert exit_code(Finding("check", status, "found") for status in statuses) == code


def test_a_remedy_stands_below_its_finding() -> None:
    assert as_table(FINDINGS, width=100).splitlines() == [
        "ok    vLLM       0.32.0",
        "warn  host link  3.1 GB/s to the device",
        "                 -> see that the card has 16 lanes",
    ]


def test_long_texts_are_wrapped_and_stay_in_their_column() -> None:
    lines = as_table([Finding("check", "ok", "word " * 40)], width=60).splitlines()
    assert len(lines) > 1
    assert all(len(line) <= 60 for line in lines)
    assert all(line.startswith(" " * 13 + "word") for line in lines[1:])


def test_a_narrow_terminal_keeps_every_word() -> None:
    assert as_table(FINDINGS, width=5).split() == as_table(FINDINGS, width=100).split()


def test_json_has_every_field() -> None:
    assert as_json(FINDINGS[1:]) == [
        {
            "check": "host link",
            "status": "warn",
            "found": "3.1 GB/s to the device",
            "remedy": "see that the card has 16 lanes",
        }
    ]
