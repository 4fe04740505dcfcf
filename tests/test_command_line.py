"""Command line: epsilon, calibration, and reports of plans."""

import json
import re
import shlex
import warnings

import pytest

import dpoptax
from dpoptax import Plan
from dpoptax.__main__ import EXAMPLES, _parser, main
from dpoptax.reports import round_up
from dpoptax.samplers import Poisson

PLAN = Plan(
    sampler=Poisson(60_000, 128), clip=2.0, noise_multiplier=1.5, num_steps=100, delta=1 / 60_000
)


@pytest.mark.slow
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


@pytest.mark.slow
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


RUN = ["epsilon", "--noise-multiplier", "1.0", "--batch-size", "1000", "--num-examples", "50000"]


def test_the_command_line_answers_what_epsilon_is(capsys):
    assert main([*RUN, "--epochs", "20", "--delta", "1e-6"]) == 0
    out = capsys.readouterr().out
    spent = dpoptax.accounting.epsilon(
        sampler=Poisson(50_000, 1000), noise_multiplier=1.0, num_steps=1000, delta=1e-6
    )
    assert out.startswith(f"epsilon = {round_up(spent)} at delta = 1e-06 (add_or_remove_one)")
    assert "1,000 steps of Poisson batches of 1,000 out of 50,000 examples" in out
    assert main([*RUN, "--steps", "0"]) == 0
    assert "epsilon = 0.000 at delta = 2e-06" in capsys.readouterr().out


def test_the_command_line_knows_other_samplers_and_relations(capsys):
    assert main([*RUN, "--steps", "1", "--sampler", "shuffled", "--delta", "1e-6"]) == 0
    assert "(replace_special), for 1 steps of Shuffled" in capsys.readouterr().out
    assert main([*RUN, "--steps", "1", "--sampler", "shuffled", "--relation",
                 "add_or_remove_one"]) == 2  # fmt: skip
    assert "no guarantee under add_or_remove_one" in capsys.readouterr().err
    run = ["calibrate", "--num-examples", "100", "--batch-size", "10.5", "--steps", "1"]
    budget = ["--epsilon", "2", "--delta", "1e-3"]
    assert main([*run, *budget, "--sampler", "fixed-size"]) == 2
    assert "--batch-size must be a whole number; got 10.5" in capsys.readouterr().err


WRONG = {
    "a rate": (["--batch-size", "0.02"], r"--batch-size is a number.* pass 0.02 \* N = 1000"),
    "more than all": (["--batch-size", "60000"], "--batch-size cannot exceed --num-examples"),
    "negative noise": (["--noise-multiplier", "-1"], "--noise-multiplier must be zero or more"),
    "negative steps": (["--steps", "-3"], "--steps must be at least 0; got -3"),
    "no data": (["--num-examples", "0"], "--num-examples must be at least 1; got 0"),
    "delta": (["--delta", "2"], "--delta must lie strictly between 0 and 1"),
    "relation": (
        ["--sampler", "shuffled", "--relation", "add_or_remove_one"],
        "--relation replace_special",
    ),
}


@pytest.mark.parametrize(("given", "match"), WRONG.values(), ids=WRONG)
def test_errors_use_the_names_of_the_command_line(given, match, capsys):
    assert main([*RUN, "--steps", "3", *given]) == 2
    error = capsys.readouterr().err
    assert re.search(match, error), error
    assert "_" not in re.sub("add_or_remove_one|replace_(one|special)", "", error)


def test_a_file_that_is_no_plan_is_named(tmp_path, capsys):
    path = tmp_path / "data.csv"
    for content in (b"age,income", b"\xff\xfe"):
        path.write_bytes(content)
        assert main(["report", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"dpoptax: {path} is not a plan: ")
        assert "income" not in error
    assert main(["report", str(tmp_path / "none.json")]) == 2
    assert (
        capsys.readouterr().err == f"dpoptax: {tmp_path / 'none.json'}: No such file or directory\n"
    )


def test_a_report_is_on_planned_steps_only(tmp_path, capsys):
    path = tmp_path / "plan.json"
    calibrate = ["calibrate", "--num-examples", "1000", "--batch-size", "100", "--steps", "5"]
    assert main([*calibrate, "--epsilon", "2", "--delta", "1e-5", "--out", str(path)]) == 0
    assert main(["report", str(path), "--steps", "5"]) == 0
    capsys.readouterr()
    assert main(["report", str(path), "--steps", "6"]) == 2
    assert "--steps must be at most the 5 steps of the plan; got 6" in capsys.readouterr().err


def test_a_warning_is_one_line_and_no_place_in_our_program(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main([*RUN, "--steps", "0", "--delta", "0.1"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dpoptax: warning: --delta should be well below 1 / N, which is 1 / 5")


def test_what_calibrate_prints_keeps_the_budget(capsys):
    budget = {"epsilon": 1.0, "delta": 1e-5}
    assert main(["calibrate", "--num-examples", "500", "--batch-size", "100", "--steps", "10",
                 "--epsilon", "1", "--delta", "1e-5"]) == 0  # fmt: skip
    noise, epsilon = re.findall(r"(?:multiplier|epsilon =) ([\d.]+)", capsys.readouterr().out)
    sampler = Poisson(500, 100)
    exact = dpoptax.accounting.calibrate_noise_multiplier(sampler=sampler, num_steps=10, **budget)
    assert float(noise) >= exact.noise_multiplier
    assert float(epsilon) >= exact.epsilon


def test_the_help_shows_a_whole_command_and_every_argument(capsys):
    for arguments, shown in (([], "dpoptax epsilon --num-examples 50000"), (RUN[:1], "ceil(E N")):
        with pytest.raises(SystemExit):
            main([*arguments, "--help"])
        assert shown in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*RUN, "--steps", "1", "--epochs", "1"])
    assert "not allowed with" in capsys.readouterr().err


def test_the_help_of_all_commands_parses_too():
    for example in re.findall(r"^  dpoptax (.*)$", EXAMPLES, re.MULTILINE):
        assert _parser().parse_args(shlex.split(example)).run


def test_epsilon_and_calibrate_print_json(capsys):
    assert main([*RUN, "--epochs", "20", "--delta", "1e-6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    spent = dpoptax.accounting.epsilon(
        sampler=Poisson(50_000, 1000), noise_multiplier=1.0, num_steps=1000, delta=1e-6
    )
    assert found == {
        "epsilon": spent, "delta": 1e-6, "relation": "add_or_remove_one", "num_steps": 1000,
        "noise_multiplier": 1.0,
    }  # fmt: skip
    free = ["epsilon", "--noise-multiplier", "0", "--batch-size", "10", "--num-examples", "100"]
    assert main([*free, "--steps", "1", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["epsilon"] == "inf"
    assert main(["calibrate", "--num-examples", "500", "--batch-size", "100", "--steps", "10",
                 "--epsilon", "1", "--delta", "1e-5", "--json"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert 0.9 < found["epsilon"] <= 1
    assert (found["batch_size"], found["num_steps"]) == (100, 10)
