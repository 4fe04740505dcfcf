"""The programs of docs/private_posteriors.md run, and its table is of the command in it."""

import pathlib
import re

import pytest

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "private_posteriors.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=["statistics", "chain"])
def test_the_programs_of_the_page_run(program, capsys):
    if "sgmcmc" in program:
        pytest.importorskip("blackjax")
    exec(compile(program, "docs/private_posteriors.md", "exec"), {})
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", capsys.readouterr().out)]
    if "sgmcmc" in program:
        temperature, mean, stddev, epsilon = numbers
        assert temperature == 1
        # The standard deviation of the posterior is 1 / sqrt(500), and draws are correlated.
        assert abs(mean - 1) < 0.2
        assert 0.02 < stddev < 0.1
        assert 1.9 < epsilon <= 2
    else:
        *limits, epsilon = numbers
        # The key is secret, so each run has other noise. A bound that is one width away from a 90 %
        # interval is five standard deviations away from its middle.
        for truth, low, high in zip((0.5, -0.5), limits[:2], limits[2:], strict=True):
            assert low - (high - low) < truth < high + (high - low)
        assert 0.9 < epsilon <= 1
