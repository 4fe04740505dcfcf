"""The command line with wrong files, closed pipes and dangerous numbers: what it says, and how."""

import csv
import json
import re
import sys

import pytest

import dpoptax
from dpoptax import Plan, samplers
from dpoptax.__main__ import main

SETTINGS = ["--num-examples", "1000", "--batch-size", "100", "--steps", "5"]
PLAN = Plan(
    sampler=samplers.Poisson(1000, 100), clip=1.0, noise_multiplier=1.5, num_steps=5, delta=1e-4
)


def printed(capsys, *command):
    """Returns the exit status, stdout in one line, and the lines of stderr."""
    status = main(list(command))
    shown = capsys.readouterr()
    return status, " ".join(shown.out.split()), shown.err.splitlines()


@pytest.fixture
def plan_file(tmp_path):
    """Writes the record of the plan with changes."""

    def write(**changes):
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(json.loads(PLAN.to_json()) | changes))
        return str(path)

    return write


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"noise_multiplier": "x"}, "noise_multiplier must be a real number"),
        ({"num_steps": None}, "num_steps"),
        ({"more": 1}, "'noise_multiplier'"),
    ],
)
def test_a_fault_of_a_file_names_the_file_and_its_fields(changes, expected, plan_file, capsys):
    for command in ("plan", "report"):
        status, out, (line,) = printed(capsys, command, path := plan_file(**changes))
        assert (status, out) == (2, "")
        assert line.startswith(f"dpoptax: {path} is not a plan: ")
        assert expected in line
        # No such option was given.
        assert "--" not in line


def test_a_number_of_thousands_of_digits_is_refused(plan_file, tmp_path, capsys):
    path = plan_file()
    text = PLAN.to_json().replace('"num_steps": 5', f'"num_steps": {"9" * 5000}')
    assert "9" * 5000 in text
    (tmp_path / "plan.json").write_text(text)
    status, _, (line,) = printed(capsys, "plan", path)
    assert status == 2
    assert "expected numbers in JSON; got one of 5000 characters" in line


def test_a_path_of_two_lines_is_named_in_one(tmp_path, capsys):
    status, _, (line,) = printed(capsys, "plan", str(tmp_path / "a\nb.json"))
    assert status == 2
    assert line.endswith("a b.json: No such file or directory")


@pytest.mark.parametrize("length", [["--steps", "9" * 23], ["--epochs", "1e12"]])
def test_more_steps_than_can_be_counted_are_refused(length, capsys):
    command = ["epsilon", *SETTINGS[:4], *length, "--noise-multiplier", "1", "--delta", "1e-5"]
    status, _, (line,) = printed(capsys, *command)
    assert status == 2
    assert "--steps must be below 2**31" in line


class Closed:
    """A pipe whose reader has gone."""

    def __init__(self, file):
        self.fileno = file.fileno

    def write(self, text):
        raise BrokenPipeError


def test_a_failed_check_fails_in_a_closed_pipe_too(plan_file, tmp_path, monkeypatch):
    with (tmp_path / "out.txt").open("w") as file, monkeypatch.context() as patch:
        for number, noise in enumerate((1.5, 0.0)):
            path = plan_file(noise_multiplier=noise)
            patch.setattr(sys, "stdout", Closed(file))
            assert main(["plan", path]) == number
            assert main(["plan", path, "--json"]) == number
            # A shell closed it: `>&-`.
            patch.setattr(sys, "stdout", None)
            assert main(["plan", path]) == number


# Words that must not promise more than the report.


@pytest.mark.filterwarnings("ignore:delta should be well below")
def test_a_plan_says_what_the_report_says_of_a_large_delta(plan_file, capsys):
    expected = "This delta is too large: it is above 1 / 1,000"
    for delta, found in ((0.01, True), (1e-4, False)):
        for command in ("plan", "report"):
            _, out, _ = printed(capsys, command, plan_file(delta=delta))
            assert (expected in out) == found


@pytest.mark.parametrize(("noise", "at_least"), [(1.5, 50.0), (0.05, 100.0)])
def test_a_plan_states_the_belief_of_its_report(noise, at_least, plan_file, capsys):
    _, out, _ = printed(capsys, "plan", path := plan_file(noise_multiplier=noise))
    belief = dpoptax.Report.from_plan(PLAN.replace(noise_multiplier=noise)).posterior_belief[0.5]
    shown = float(re.search(r"from 50 % to at most ([\d.]+) %", out)[1])
    assert at_least <= shown <= 100
    assert 0 <= shown - 100 * belief <= 0.1
    assert f"rise from 50 % to {shown:.1f} %" in printed(capsys, "report", path)[1]


def test_an_infinite_epsilon_has_the_reason_of_the_report(plan_file, capsys):
    for noise, reason in ((0.0, "no noise"), (1e-200, "no finite epsilon can be shown")):
        for command in ("plan", "report"):
            status, out, _ = printed(capsys, command, plan_file(noise_multiplier=noise))
            assert status == 1
            assert reason in out
    # As extreme, and private.
    assert printed(capsys, "report", plan_file(noise_multiplier=1e200))[0] == 0


def test_extreme_numbers_have_an_answer(capsys):
    budget = ["--epsilon", "1", "--delta", "1e-5"]
    for free in (SETTINGS[2:4], SETTINGS[4:]):
        command = ["calibrate", *SETTINGS[:2], *free, *budget, "--noise-multiplier"]
        status, _, (line,) = printed(capsys, *command, "1e-200")
        assert status == 2
        assert "out of reach" in line
        assert printed(capsys, *command, "1e200")[0] == 0
    command = ["plan", *SETTINGS[:2], *budget, "--num-parameters", "10", "--epochs"]
    assert "1,000 times on average" in printed(capsys, *command, "1000")[1]
    assert "2,000 times on average" in printed(capsys, *command, "1e300")[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("always::UserWarning")
def test_synthetic_data_from_a_seed_or_with_a_large_delta_are_not_called_private(tmp_path, capsys):
    pytest.importorskip("mbi")
    schema, table = tmp_path / "schema.json", tmp_path / "table.csv"
    columns = {name: {"type": "integer", "range": [0, 9]} for name in "ab"}
    schema.write_text(json.dumps({"columns": columns}))
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["a", "b"], *([number % 10, 5] for number in range(300))])
    command = ["synthesize", str(table), "--schema", str(schema), "--epsilon", "1",
               "--no-pictures", "--out"]  # fmt: skip
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    assert printed(capsys, *command, first, "--delta", "1e-6")[2] == []
    _, _, (line,) = printed(capsys, *command, second, "--delta", "1e-6", "--seed", "1")
    assert "--seed 1, so nothing here is private" in line
    _, _, (line,) = printed(capsys, *command, third, "--delta", "0.1")
    assert "--delta 0.1. This delta is too large" in line
