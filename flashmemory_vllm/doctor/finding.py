"""What one check found, and how findings are shown."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]

GIB = 1 << 30
_STATUS_WIDTH = 6


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was looked at.
        status: `ok`; `warn` when it works but not as well as it could; `fail` when a server would not start.
        found: what is there.
        remedy: what to do about it. Empty when there is nothing to do.
    """

    check: str
    status: Status
    found: str
    remedy: str = ""


def exit_code(findings: Iterable[Finding]) -> int:
    """1 if any check failed, else 0."""
    return int(any(finding.status == "fail" for finding in findings))


def as_json(findings: Iterable[Finding]) -> list[dict[str, str]]:
    """The findings as objects with the fields of `Finding`."""
    return [asdict(finding) for finding in findings]


def as_table(findings: Sequence[Finding], width: int) -> str:
    """The findings as text, each with its remedy below it.

    Args:
        findings: what to show, in this order.
        width: columns of the terminal; longer texts are wrapped.
    """
    check_width = max((len(finding.check) for finding in findings), default=0) + 2
    indent = " " * (_STATUS_WIDTH + check_width)
    lines: list[str] = []
    for finding in findings:
        first = f"{finding.status:<{_STATUS_WIDTH}}{finding.check:<{check_width}}"
        lines += _wrap(finding.found, width, first, indent)
        if finding.remedy:
            lines += _wrap(f"-> {finding.remedy}", width, indent, indent + "   ")
    return "\n".join(lines)


def _wrap(text: str, width: int, first: str, rest: str) -> list[str]:
    # A narrow terminal must not squeeze the texts into nothing
    columns = max(width, len(rest) + 30)
    return textwrap.wrap(text, columns, initial_indent=first, subsequent_indent=rest, break_long_words=False)
