"""Which blocks each request has slots for, by what they are remembered for: who comes, who goes."""

from flashmemory_kernels.choose_sets.naive import COMES, GOES, LIST_HEADER, WORTH, ChoicePolicy
from flashmemory_kernels.choose_sets.op import choose_sets

__all__ = ["COMES", "GOES", "LIST_HEADER", "WORTH", "ChoicePolicy", "choose_sets"]
