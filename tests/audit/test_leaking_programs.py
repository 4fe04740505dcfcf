"""No leaking program is certified."""

import pytest
from audit.leaking_programs import DATASET, PROGRAMS, honest, initial

import dpoptax


def test_the_program_without_a_leak_is_certified():
    found = dpoptax.certify(honest, initial(), DATASET, private="data")
    assert found.certified, str(found)


def test_there_are_enough_programs():
    assert len(PROGRAMS) >= 50


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_leaking_program_is_not_certified(name):
    found = dpoptax.certify(PROGRAMS[name], initial(), DATASET, private="data")
    assert not found.certified
    assert all(leak.what for leak in found.leaks)
    print(found)
