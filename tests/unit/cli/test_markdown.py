"""Tables in Markdown."""

from flashmemory_vllm.cli.markdown import table


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    assert table(("a", "b"), [("1 | 2", "3")]) == "| a | b |\n| --- | --- |\n| 1 \\| 2 | 3 |\n"
