"""Loops over arrays, made into machine code by numba where it is: vLLM brings it along, but nobody has to have it.

Code is made when a loop is first called, which takes seconds, so whoever uses one calls it before anybody waits. It is
kept on disk for the next start, in a folder that nobody else writes to: whoever could would have his code run here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

try:
    import numba  # type: ignore[import-untyped]
except ImportError:  # not there, or made for another numpy
    numba = None

Function = TypeVar("Function", bound=Callable[..., Any])
IS_COMPILED = numba is not None and not numba.config.DISABLE_JIT


def loop(function: Function) -> Function:
    """Have a function compiled when it is first called; without numba it is left as it is.

    Code on disk is that of a file as it stood: a loop may use other loops and constants of its own file alone.
    """
    if not IS_COMPILED:
        return function
    try:
        kept = numba.njit(cache=True)(function)
        if _is_ours(Path(kept.stats.cache_path), Path(function.__code__.co_filename)):
            return cast("Function", kept)
    except RuntimeError:  # there is no folder that it could write to
        pass
    return cast("Function", numba.njit(function))


def plain(function: Function) -> Function:
    """The same loop in Python."""
    return cast("Function", getattr(function, "py_func", function))


def _is_ours(folder: Path, source: Path) -> bool:
    """Whether a folder is as safe as the source's own byte code, or nobody else may write to it or move it away."""
    if folder.parent == source.parent:
        return True
    above = (parent.stat() for parent in folder.resolve().parents)
    # Where others may write, as in /tmp, what is ours stays ours if only owners may move it
    is_fixed = all(one.st_uid in {0, os.geteuid()} and (not _others_write(one) or _is_sticky(one)) for one in above)
    found = folder.stat()
    return is_fixed and found.st_uid == os.geteuid() and not _others_write(found)


def _others_write(found: os.stat_result) -> bool:
    return bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _is_sticky(found: os.stat_result) -> bool:
    return bool(found.st_mode & stat.S_ISVTX)
