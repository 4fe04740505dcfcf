"""Optional and heavy dependencies are loaded when they are used."""

import subprocess
import sys

import pytest


@pytest.mark.e2e
def test_importing_vi_loads_no_numpyro_and_no_guides():
    program = """
import sys
import dpoptax.vi
for name in ("numpyro", "dpoptax.vi.numpyro", "dpoptax.vi.guides", "dpoptax.vi.models"):
    assert name not in sys.modules, name
assert dpoptax.vi.guides.MeanField
"""
    subprocess.run([sys.executable, "-c", program], check=True)
