"""One process that checks many ops: a line for each, whatever becomes of the others."""

import sys
import traceback
from collections.abc import Callable


def report(op: str, check: Callable[[], object]) -> None:
    """Print whether an op agrees with its specification, and where it does not.

    Args:
        op: its name.
        check: raises where they differ.
    """
    try:
        check()
    except Exception:  # noqa: BLE001 - whatever it is, the other ops are still to be checked
        sys.stdout.write(f"\n{op}: {traceback.format_exc()}\n")
    else:
        sys.stdout.write(f"\n{op}: agrees\n")
    sys.stdout.flush()
