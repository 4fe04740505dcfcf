"""The README's programs run as they stand, each pasted into a file of its own."""

import pathlib
import re
import subprocess
import sys

import pytest

README = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("program", PROGRAMS, ids=["fit", "chain"])
def test_the_programs_of_the_readme_run(program, tmp_path):
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(program.splitlines()) < 30
    if "report" in program:
        accuracy = float(re.search(r"accuracy ([\d.]+)", done.stdout).group(1))
        assert accuracy > 0.85
        assert re.search(r"\((1\.9\d\d|2\.000), 1e-05\)-differential privacy", done.stdout)
    else:
        numbers = [float(number) for number in re.findall(r"\d+\.\d+", done.stdout)]
        assert all(2.5 < number < 3.5 for number in numbers[:2])
        assert 0 < numbers[2] < 10
