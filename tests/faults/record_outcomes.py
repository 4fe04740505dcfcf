"""A pytest plugin that writes how each test ended, and why, for `run_faults.py`."""

import importlib
import json
import os
import pathlib
import time

import jax
import pytest

_outcomes: dict[str, dict[str, str]] = {}


def _is_assertion(error: BaseException) -> bool:
    """Whether a check of a test failed, and not the code that it runs."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_assertion, error.exceptions))
    if isinstance(error, pytest.fail.Exception):  # such as "DID NOT RAISE"
        return True
    if not isinstance(error, AssertionError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # An assert statement of the library is no check of a test.
    return trace is None or "dpoptax" not in pathlib.Path(trace.tb_frame.f_code.co_filename).parts


def pytest_configure():
    """JAX was imported before `conftest.py` chose where it keeps compiled programs."""
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Records the first failure of a test, or that it passed."""
    report = yield
    known = _outcomes.get(item.nodeid)
    if call.excinfo is not None and not (known and known["outcome"] != "passed"):
        if report.skipped:
            outcome = "skipped"
        else:
            caught = call.when == "call" and _is_assertion(call.excinfo.value)
            outcome = "failed" if caught else "error"
        lines = str(call.excinfo.value).strip().splitlines()
        message = f"{call.excinfo.type.__name__}: {lines[0] if lines else ''}"
        _outcomes[item.nodeid] = {"outcome": outcome, "message": message}
    elif call.when == "call" and known is None:
        _outcomes[item.nodeid] = {"outcome": "passed", "message": ""}
    return report


def pytest_sessionfinish(session, exitstatus):
    """Writes the outcomes, the copy of the library that was imported, and the processor time."""
    try:
        library = importlib.import_module("dpoptax").__file__
    except BaseException as error:
        library = f"{type(error).__name__}: {error}"
    path = pathlib.Path(os.environ["DPOPTAX_FAULT_OUTCOMES"])
    found = {"library": library, "seconds": time.process_time(), "tests": _outcomes}
    path.write_text(json.dumps(found))
