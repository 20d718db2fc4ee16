"""Shapes of `copy_pages` shared by tests and benchmarks."""

from typing import NamedTuple


class CopyCase(NamedTuple):
    """n pages of page_elems elements out of a pool whose rows are row_elems apart."""

    num_pool_pages: int
    num_pages: int
    page_elems: int
    row_elems: int


CASES = (
    CopyCase(num_pool_pages=4, num_pages=1, page_elems=2, row_elems=2),
    CopyCase(num_pool_pages=9, num_pages=5, page_elems=30, row_elems=98),
    CopyCase(num_pool_pages=17, num_pages=17, page_elems=2048, row_elems=2048),
    CopyCase(num_pool_pages=12, num_pages=7, page_elems=4098, row_elems=12294),
)
