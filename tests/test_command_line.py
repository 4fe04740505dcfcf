"""Command line: reports of plans, and calibration."""

import json

import pytest

from dpoptax import Plan
from dpoptax.__main__ import main
from dpoptax.samplers import Poisson

PLAN = Plan(
    sampler=Poisson(60_000, 128), clip=2.0, noise_multiplier=1.5, num_steps=100, delta=1 / 60_000
)


def test_the_command_line_reports(tmp_path, capsys):
    path = tmp_path / "plan.json"
    path.write_text(PLAN.to_json())
    assert main(["report", str(path), "--steps", "10", "--figure", str(tmp_path / "a.png")]) == 0
    assert "10 done of 100 planned" in capsys.readouterr().out
    assert (tmp_path / "a.png").exists()
    assert main(["report", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps_done"] == 100
    assert main(["report", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["--batch-size", "20", "--epochs", "10"], "noise_multiplier"),
        (["--batch-size", "20", "--noise-multiplier", "2"], "num_steps"),
        (["--noise-multiplier", "2", "--steps", "100"], "batch_size"),
    ],
)
def test_the_command_line_finds_what_is_not_given(given, name, tmp_path, capsys):
    path = tmp_path / "plan.json"
    budget = ["--num-examples", "1000", "--epsilon", "2", "--delta", "1e-5", "--out", str(path)]
    assert main(["calibrate", *budget, *given]) == 0
    assert capsys.readouterr().out.startswith(f"{name} ")
    assert 1.9 < Plan.from_json(path.read_text()).epsilon() <= 2.0
    assert main(["calibrate", *budget, *given[:2]]) == 2
    assert "the one that is left out is found" in capsys.readouterr().err
