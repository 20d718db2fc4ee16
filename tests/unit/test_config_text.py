"""What an option may be is told in words."""

import pytest
from pydantic import BaseModel, Field

from flashmemory_vllm.config_text import describe_allowed


class Options(BaseModel):
    share: float = Field(default=0.5, gt=0, le=1)
    steps: int | None = Field(default=None, ge=1)
    name: str = ""
    on: bool = False


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("share", "a number > 0 and <= 1"),
        ("steps", "unset or an integer >= 1"),
        ("name", "text"),
        ("on", "true or false"),
    ],
)
def test_type_and_bounds_are_told(name: str, told: str) -> None:
    assert describe_allowed(Options.model_fields[name]) == told
