"""What an option may be, in words: for error messages and for the table of options."""

from collections.abc import Mapping
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

# Of vLLM's additional config, where our options are
SECTION = "flashmemory"
_BOUNDS = ((Gt, "gt", ">"), (Ge, "ge", ">="), (Le, "le", "<="))
_TYPE_WORDS = {str: "text", int: "an integer", float: "a number", bool: "true or false", NoneType: "unset"}


def describe_allowed(field: FieldInfo) -> str:
    """What values a field takes, in words: `a number > 0 and <= 1`.

    Args:
        field: a field of a model of options.

    Returns:
        Text for messages and the generated table.
    """
    bounds = [
        f"{sign} {getattr(item, name)}"
        for item in field.metadata
        for kind, name, sign in _BOUNDS
        if isinstance(item, kind)
    ]
    return " ".join([_describe_type(field.annotation), " and ".join(bounds)]).strip()


def _describe_type(annotation: Any) -> str:  # noqa: ANN401 - a type expression has no type of its own
    origin = get_origin(annotation)
    if origin in {Union, UnionType}:
        # bounds follow the text, so that the type they belong to comes last
        members = sorted(get_args(annotation), key=lambda member: member is not NoneType)
        return " or ".join(_describe_type(member) for member in members)
    if origin is Annotated:
        return _describe_type(get_args(annotation)[0])
    if origin is Literal:
        return "one of " + ", ".join(get_args(annotation))
    if origin is tuple:
        return "a list of layer indices >= 0"
    return _TYPE_WORDS[annotation]


def explain(detail: ErrorDetails, fields: Mapping[str, FieldInfo]) -> str:
    """One sentence for one error of pydantic about our options."""
    key = str(detail["loc"][0]) if detail["loc"] else SECTION
    if detail["type"] == "extra_forbidden":
        closest = get_close_matches(key, list(fields), n=1, cutoff=0)[0]
        return (
            f"{SECTION}.{key} is no option (given: {detail['input']!r}): closest is {SECTION}.{closest}, "
            f"{describe_allowed(fields[closest])}"
        )
    if key not in fields:
        return str(detail["ctx"]["error"])
    where = "".join(f"[{index}]" for index in detail["loc"][1:] if isinstance(index, int))
    return f"{SECTION}.{key}{where} is {detail['input']!r}: allowed is {describe_allowed(fields[key])}"
