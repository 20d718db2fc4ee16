"""Every op folder has the files that the table in kernels/README.md promises, and a test of the op's name."""

from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
OPS = sorted(
    folder.name
    for folder in (KERNELS / "flashmemory_kernels").iterdir()
    if folder.is_dir() and folder.name not in {"common", "__pycache__"}
)


def test_there_are_ops() -> None:
    assert OPS


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("file", ["__init__.py", "naive.py", "op.py", "cases.py"])
def test_op_folder_is_complete(op: str, file: str) -> None:
    assert (KERNELS / "flashmemory_kernels" / op / file).is_file()


@pytest.mark.parametrize("op", OPS)
def test_op_has_a_test_and_a_row_in_the_table(op: str) -> None:
    assert (Path(__file__).parent / f"test_{op}.py").is_file()
    row = next(line for line in (KERNELS / "README.md").read_text().splitlines() if line.startswith(f"| `{op}`"))
    has_kernel = (KERNELS / "flashmemory_kernels" / op / "kernel.py").is_file()
    assert ("`kernel.py`" in row) == has_kernel


def test_kernels_folder_is_no_package() -> None:
    assert not (KERNELS / "__init__.py").exists()
