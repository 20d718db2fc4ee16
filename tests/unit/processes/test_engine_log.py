"""What ended an engine is found among echoes, warnings and what is said beside it."""

import pytest

from flashmemory_vllm.processes.engine_log import find_error, has_failed

ECHOED = """\
(EngineCore pid=7) ERROR 11-24 02:32:48 [core.py:1510] ValueError: too long
ValueError: too long
RuntimeError: Engine core initialization failed. See root cause above.
"""
WARNED = "(MainProcess pid=7) WARNING 11-24 [base.py:380] ValueError: Tokenizer not available"
INVALID = """\
core.ValidationError: 1 validation error for VllmConfig
  Value error, flashmemory.tau is no option [type=value_error, input_value=Args
    For further information
"""
INVALID_CAUSE = "core.ValidationError: 1 validation error for VllmConfig: Value error, flashmemory.tau is no option"


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("all is well\nINFO no Error: here", None),
        (ECHOED, "ValueError: too long"),
        (WARNED, None),
        (f"{ECHOED}{WARNED}", "ValueError: too long"),
        (INVALID, INVALID_CAUSE),
        ("(Worker pid=8) ERROR 11-30 19:35:40 [executor.py:1063] Exception: only on GPUs", "Exception: only on GPUs"),
        ("INFO an Exception: none", None),
        ("torch.OutOfMemoryError: CUDA out of memory.", "torch.OutOfMemoryError: CUDA out of memory."),
    ],
)
def test_the_cause_is_found_among_echoes_and_warnings(log: str, error: str | None) -> None:
    assert find_error(log) == error


# Of Python 3.11, from a process that is on its way out while a thread of it still cleans up
AT_EXIT = """\
Exception ignored in atexit callback: <bound method finalize._exitfunc of <class 'weakref.finalize'>>
Traceback (most recent call last):
  File "/usr/lib/python3.11/weakref.py", line 647, in _exitfunc
    pending = cls._select_for_exit()
RuntimeError: dictionary changed size during iteration
"""
IN_A_THREAD = """\
Exception in thread MultiprocWorkerMonitor:
Traceback (most recent call last):
  File "/usr/lib/python3.11/threading.py", line 1045, in _bootstrap_inner
    self.run()
RuntimeError: dictionary changed size during iteration
"""
LOGGED_BESIDE = """\
(EngineCore pid=7) ERROR 11-24 02:32:48 [core.py:1510] Exception in thread Thread-3:
(EngineCore pid=7) ERROR 11-24 02:32:48 [core.py:1510] Traceback (most recent call last):
(Worker pid=8) ERROR 11-24 02:32:48 [core.py:1510] ValueError: of the worker
(EngineCore pid=7) ERROR 11-24 02:32:48 [core.py:1510]   File "a.py", line 1, in run
(EngineCore pid=7) ERROR 11-24 02:32:48 [core.py:1510] RuntimeError: dictionary changed size during iteration
"""
PASSED_ON = """\
(Worker pid=8) ERROR 11-24 02:32:48 [core.py:1020] flashmemory_vllm.errors.ConfigError: 2 given, allowed: 1
(EngineCore pid=7) ERROR 11-24 02:32:48 [core.py:1510] RuntimeError: Worker failed with error '2 given, allowed: 1', \
please check the stack trace above for the root cause
"""


@pytest.mark.parametrize("beside", [AT_EXIT, IN_A_THREAD])
@pytest.mark.parametrize("order", ["{reason}{beside}", "{beside}{reason}"])
def test_what_ends_nothing_is_not_the_reason(order: str, beside: str) -> None:
    assert find_error(order.format(reason=ECHOED, beside=beside)) == "ValueError: too long"
    assert find_error(beside) is None


def test_an_aside_is_told_apart_by_its_process() -> None:
    assert find_error(LOGGED_BESIDE) == "ValueError: of the worker"


def test_the_error_of_a_worker_is_told_not_that_of_who_waited_for_it() -> None:
    assert find_error(PASSED_ON) == "flashmemory_vllm.errors.ConfigError: 2 given, allowed: 1"


def test_an_engine_that_says_it_failed_has_failed() -> None:
    failed = "(EngineCore pid=7) ERROR 11-24 02:32:48 [core.py:1510] EngineCore failed to start."
    assert has_failed(f"all is well\n{failed}\n{ECHOED}")
    assert not has_failed(WARNED)
