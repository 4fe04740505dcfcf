"""What the README and the docs show is what one gets."""

import doctest
import pathlib
import re
import subprocess
import sys

import pytest

from dpoptax.__main__ import main

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.e2e
@pytest.mark.parametrize("program", PROGRAMS, ids=["fit", "loop"])
def test_the_programs_of_the_readme_run(program, tmp_path):
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(program.splitlines()) < 30
    if "report" in program:
        (shown,) = re.findall(r"^```text\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.OutputChecker().check_output(shown, done.stdout, flags), done.stdout
    else:
        numbers = [float(number) for number in re.findall(r"\d+\.\d+", done.stdout)]
        *params, epsilon = numbers[-3:]
        assert all(2.5 < number < 3.5 for number in params)
        assert 0 < epsilon < 10
        assert "200 steps" in done.stdout


def test_the_numbers_of_the_readme_are_those_of_the_pages_that_it_names():
    for line in re.findall(r"^- \*\*.*?\]\(docs/\w+\.md\)", README, re.DOTALL | re.MULTILINE):
        page = re.search(r"docs/(\w+)\.md", line).group(1)
        text = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in (page, "benchmarks"))
        for number in re.findall(r"\d[\d,]*\.?\d+", line):
            assert number in text, f"{number} is not in docs/{page}.md"


@pytest.mark.e2e
def test_the_program_of_the_page_on_augmentation_runs(tmp_path):
    page = (ROOT / "docs" / "augmentation.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"accuracy ([\d.]+)", done.stdout).group(1)) > 0.65


@pytest.mark.slow
def test_the_report_in_the_docs_is_that_of_the_plan_beside_it(capsys):
    assert main(["report", str(ROOT / "docs" / "mnist_vae_plan.json")]) == 0
    page = (ROOT / "docs" / "accounting.md").read_text()
    for line in capsys.readouterr().out.splitlines():
        if "dp-accounting" not in line:  # the line of the versions
            assert line in page
