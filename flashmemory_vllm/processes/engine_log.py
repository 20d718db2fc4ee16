"""Finds in what vLLM's processes have printed why an engine has ended."""

import re
from itertools import pairwise

# How each process that vLLM starts prints: (name pid=1) LEVEL month-day time [file:line] text
_PREFIX = re.compile(r"^\((?P<process>\S+ pid=\d+)\) (?P<level>[A-Z]+) [\d-]+ [\d:]+ \[[^\]]+\] ?")
# A bare `Exception` only at the beginning of a line: within sentences it is a word
_ERROR = re.compile(r"((?:^|(?<=[\s\])]))(?:\w+\.)*\w+(?:Error|Exception|Interrupt|Exit): .+|^Exception: .+)$")
# What a process says that fails because another one has failed before
_ECHOES = (
    "Engine core initialization failed",
    "EngineCore encountered an issue",
    "EngineDeadError",
    "See stack trace for root cause",
    "please check the stack trace above for the root cause",
)
# What Python says of errors that end nothing: at exit, in a finalizer, in a thread beside
_ASIDES = ("Exception ignored in", "Exception in thread")
# After these an engine does not come back
_FATAL = ("EngineCore failed to start.", "EngineCore encountered a fatal error.", "WorkerProc failed to start.")


def find_error(log: str) -> str | None:
    """The error that ended an engine: the last one that is neither an echo nor an aside.

    Args:
        log: what its processes printed.

    Returns:
        The error's type and the first line of its message, or None without an error.
    """
    told = None
    beside: set[str] = set()
    for line, following in pairwise([*log.splitlines(), ""]):
        prefix = _PREFIX.match(line)
        process = prefix["process"] if prefix else ""
        text = line[prefix.end() :] if prefix else line
        if text.startswith(_ASIDES):
            beside.add(process)
            continue
        if not text or text[0].isspace() or text.startswith("Traceback (most"):
            continue
        # The first line of a traceback that is not indented is its error
        is_aside = process in beside
        beside.discard(process)
        match = _ERROR.search(text)
        is_warning = " WARNING " in line if prefix is None else prefix["level"] == "WARNING"
        if match and not is_aside and not is_warning and not any(echo in text for echo in _ECHOES):
            told = match.group(1)
            if "validation error" in told:  # pydantic says on the next line what is wrong
                told = f"{told}: {following.split(' [type=')[0].strip()}"
    return told


def has_failed(log: str) -> bool:
    """Whether a process of the engine has said that it failed, be it still there or not."""
    return any(said in log for said in _FATAL)
