"""Markdown tables of what the code and the measured rows say."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """One table.

    Args:
        header: names of the columns.
        rows: cells of each line, as many as the header has; a bar in a cell is escaped.

    Returns:
        The lines of the table, the last one ended.
    """
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
