"""A step's changes to the tables of all requests, and what attention reads of them."""

from flashmemory_kernels.apply_step.op import apply_step
from flashmemory_kernels.apply_step.tables import EDIT_FIELDS, ROW_FIELDS, RUN_FIELDS, PlaceTables, StepCounts

__all__ = ["EDIT_FIELDS", "ROW_FIELDS", "RUN_FIELDS", "PlaceTables", "StepCounts", "apply_step"]
