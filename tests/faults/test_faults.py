"""The list of planted faults fits the library, the tests and the documentation.

`make faults` plants them and runs the tests, see `run_faults.py`.
"""

import re

import planted_faults as faults
import pytest
from run_faults import Run, verdict

FAULTS = faults.load()


def test_every_fault_fits_the_code():
    """Who changes the code under a fault writes the fault for the new code."""
    for fault in FAULTS:
        text = faults.planted(fault, (faults.ROOT / "dpoptax" / fault.file).read_text())
        compile(text, fault.file, "exec")


def test_every_fault_names_tests_that_exist():
    functions: dict[str, set[str]] = {}
    for fault in FAULTS:
        assert fault.tests
        for test in fault.tests:
            file, _, name = test.partition("::")
            if file not in functions:
                source = (faults.ROOT / file).read_text()
                functions[file] = set(re.findall(r"^def (test_\w+)", source, re.MULTILINE))
            assert name.partition("[")[0] in functions[file], (fault.name, test)


def test_there_are_enough_faults_and_each_one_differs():
    assert len(FAULTS) >= 45
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({(fault.file, fault.old.strip(), fault.new.strip()) for fault in FAULTS}) == len(
        FAULTS
    )


def test_the_documentation_lists_them():
    assert faults.TABLE.read_text() == faults.table(FAULTS), "run make faults ARGS=--write-table"


def test_code_that_has_changed_is_noticed():
    with pytest.raises(ValueError, match=r"exactly once.*occurs 0 times"):
        faults.planted(FAULTS[0], "")
    with pytest.raises(ValueError, match=r"exactly once.*occurs 2 times"):
        faults.planted(FAULTS[0], 2 * FAULTS[0].old)


@pytest.mark.parametrize(
    ("outcome", "problem"),
    [
        ("failed", ""),
        ("passed", "not caught"),
        ("error", "did not fail in a check"),
        ("skipped", "did not fail in a check"),
    ],
)
def test_only_a_check_that_fails_catches_a_fault(outcome, problem):
    fault = FAULTS[0]
    outcomes = {test: {"outcome": outcome, "message": "what"} for test in fault.tests}
    assert problem in verdict(fault, Run(1.0, outcomes))
    assert bool(problem) == bool(verdict(fault, Run(1.0, outcomes)))
