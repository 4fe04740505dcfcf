"""The command line in scripts: exit statuses, JSON, errors, and the examples that it shows."""

import csv
import json
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax import Plan
from dpoptax.__main__ import EXIT_STATUS, _parser, main
from dpoptax.audit import Audit
from dpoptax.samplers import take

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "command_line.md").read_text()
COMMANDS = ["plan", "calibrate", "epsilon", "report", "verify", "audit", "synthesize"]
PLAN = Plan(
    sampler=dpoptax.samplers.Poisson(1000, 100), clip=1.0, noise_multiplier=1.5, num_steps=5,
    delta=1e-4,
)  # fmt: skip
SETTINGS = ["--num-examples", "1000", "--batch-size", "100", "--noise-multiplier", "1.5",
            "--steps", "5", "--delta", "1e-4"]  # fmt: skip
BUDGET = ["--num-examples", "5000", "--num-parameters", "2410", "--epsilon", "3", "--delta", "1e-6"]
SCHEMA = {
    "columns": {
        "age": {"type": "integer", "range": [18, 90]},
        "income": {"type": "categorical", "values": ["low", "high"]},
    }
}


def certificate():
    """The certificate of a step under the plan."""
    tx = PLAN.privatize(jax.random.key(1))

    def step(w, state, sampler_state, data):
        sampler_state, batch = PLAN.sampler.sample(sampler_state)
        grads = dpoptax.per_example_grads(lambda w, x: (w - x) ** 2)(w, take(data, batch))
        updates, state = tx.update(grads, state, w)
        return optax.apply_updates(w, updates), state, sampler_state

    w = jnp.zeros(())
    states = tx.init(w), PLAN.sampler.init(jax.random.key(2))
    return dpoptax.certify(step, w, *states, jnp.zeros(1000), private="data", plan=PLAN)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with the files that the examples read."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    pathlib.Path("plan.json").write_text(PLAN.replace(num_steps=1000).to_json())
    canaries = rng.normal(0.1, 1, 400), rng.normal(0, 1, 400)
    pathlib.Path("audit.json").write_text(Audit.from_scores(*canaries, plan=PLAN).to_json())
    pathlib.Path("schema.json").write_text(json.dumps(SCHEMA))
    pathlib.Path("certificate.json").write_text(certificate().to_json())
    with pathlib.Path("table.csv").open("w", newline="") as file:
        rows = zip(rng.integers(18, 91, 2000), rng.choice(["low", "high"], 2000), strict=True)
        csv.writer(file).writerows([("age", "income"), *rows])
    return tmp_path


def examples_of(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    return re.findall(r"^  dpoptax (.*)$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_examples_that_can_be_copied(command, capsys):
    shown = examples_of(command, capsys)
    assert shown
    for example in shown:
        assert example.split()[0] == command
        assert _parser().parse_args(shlex.split(example)).run


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_the_help_run(command, files, capsys):
    pytest.importorskip("matplotlib")
    if command == "synthesize":
        pytest.importorskip("mbi")
    for example in examples_of(command, capsys):
        assert main(shlex.split(example)) == 0, example
        out = capsys.readouterr().out
        if "--json" in example:
            json.loads(out)
        for made in re.findall(r"--(?:out|figure) (\S+)", example):
            assert (files / made).exists()


@pytest.mark.slow
def test_the_json_has_the_fields_that_the_page_lists(files, capsys):
    rows = re.findall(r"^\| `(\w+)`(, if the check failed)? \| (`.*) \|$", PAGE, re.MULTILINE)
    listed = {
        command + failed: set(re.findall(r"`(\w+)`", fields)) for command, failed, fields in rows
    }
    wrong = json.loads(pathlib.Path("certificate.json").read_text())
    wrong["guarantee"]["epsilon"] /= 2
    pathlib.Path("wrong.json").write_text(json.dumps(wrong))
    commands = {
        "plan": (["plan", "plan.json"], 0),
        "calibrate": (["calibrate", *SETTINGS[:4], *SETTINGS[6:], "--epsilon", "2"], 0),
        "epsilon": (["epsilon", *SETTINGS], 0),
        "verify": (["verify", "certificate.json"], 0),
        "verify, if the check failed": (["verify", "wrong.json"], 1),
        "audit": (["audit", "audit.json"], 0),
    }
    for name, (command, status) in commands.items():
        assert main([*command, "--json"]) == status
        assert set(json.loads(capsys.readouterr().out)) == listed.pop(name), name
    assert main(["report", "plan.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "dpoptax report 1"
    assert hasattr(dpoptax.Report.from_plan(PLAN), "epsilon_by_delta")
    # `report` and `synthesize` are documents of their own; the examples of their help print them.
    assert set(listed) == {"synthesize"}


def test_every_command_is_on_the_page_and_prints_json():
    shown = re.findall(r"^\| `(\w+)` \| [^`]", PAGE, re.MULTILINE)
    assert shown[: len(COMMANDS)] == COMMANDS
    for command in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([command, "--json", "--no-such-option"])
        assert ended.value.code == 2


def test_the_exit_statuses_are_those_of_the_page(tmp_path, capsys):
    for number, meaning in re.findall(r"^  (\d)  (.*)$", EXIT_STATUS, re.MULTILINE):
        assert re.search(rf"^\| {number} \| {meaning[:35]}", PAGE, re.MULTILINE)
    assert main(["epsilon", *SETTINGS]) == 0
    free = [*SETTINGS[:5], "0", *SETTINGS[6:]]
    path = tmp_path / "free.json"
    for command in (["epsilon", *free], ["plan", *free, "--out", str(path)], ["plan", str(path)]):
        assert main(command) == 1
        assert "inf" in capsys.readouterr().out
    assert main(["epsilon", *SETTINGS[:8], "--delta", "2"]) == 2


def test_an_error_is_one_line_without_a_traceback(tmp_path, capsys):
    path = tmp_path / "x.json"
    for command in (["plan", str(path)], ["verify", str(path)], ["plan"], [*BUDGET], []):
        try:
            status = main(command)
        except SystemExit as ended:
            status = ended.code
        shown = capsys.readouterr()
        assert (status, shown.out) == (2, "")
        (line,) = shown.err.splitlines()
        assert line.startswith("dpoptax")


def test_a_library_that_is_missing_is_an_error_of_one_line(tmp_path, capsys, monkeypatch):
    path = tmp_path / "plan.json"
    path.write_text(PLAN.to_json())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", str(path), "--figure", str(tmp_path / "a.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "matplotlib" in line


@pytest.mark.e2e
def test_the_console_script_works_in_a_pipe():
    command = f"{shlex.quote(sys.executable)} -m dpoptax --help | head -n 1; echo $PIPESTATUS"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True,
        cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.startswith("usage: dpoptax")
    assert not done.stderr


# `dpoptax plan`: the same plan from its three sources.


def test_a_plan_of_settings_is_that_plan(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert main(["plan", *SETTINGS, "--out", str(path)]) == 0
    assert Plan.from_json(path.read_text()) == PLAN
    out = capsys.readouterr().out
    assert "each single example of 1,000" in out
    assert f"epsilon = {dpoptax.reports.round_up(PLAN.epsilon())}" in out
    assert main(["plan", *SETTINGS, "--json", "--clip", "0.5", "--sampler", "fixed-size"]) == 0
    found = json.loads(capsys.readouterr().out)
    again = Plan.from_json(json.dumps(found["plan"]))
    assert again.clip == dpoptax.clipping.FlatClip(0.5)
    assert isinstance(again.sampler, dpoptax.samplers.FixedSize)
    assert found["epsilon"] == again.epsilon()


def test_a_plan_with_schedules_is_read_too(tmp_path, capsys):
    stages = [(dpoptax.samplers.Poisson(1000, size), 2) for size in (50, 100)]
    plan = PLAN.replace(
        sampler=dpoptax.samplers.PoissonSchedule(stages),
        noise_multiplier=optax.linear_schedule(1.0, 2.0, 3),
    )
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert main(["plan", str(tmp_path / "plan.json")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "draws between 50 and 100 examples" in out
    assert "is between 1 and 2 times the clip bound" in out
    assert main(["plan", str(tmp_path / "plan.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["noise_multiplier"]["kind"] == "Schedule"


def test_a_plan_states_the_noise_that_its_clip_rule_leaves_open(tmp_path, capsys):
    plan = PLAN.replace(clip=dpoptax.clipping.QuantileClip(), noise_multiplier=2.0)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert main(["plan", str(tmp_path / "plan.json")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    # Five noise multipliers on the count, which the report states too.
    assert "count_noise 10)" in out
    assert dpoptax.Report.from_plan(plan).clip["count_noise"] == 10.0
    assert f"is {plan.gradient_noise_multiplier:.6g} times the clip bound" in out
    assert "None" not in out


@pytest.mark.slow
def test_a_suggested_plan_keeps_the_budget_and_says_why(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert main(["plan", *BUDGET, "--out", str(path)]) == 0
    out = capsys.readouterr().out
    assert "Suggested for 5,000 examples" in out
    assert "optax.adam" in out
    assert 2.9 < Plan.from_json(path.read_text()).epsilon() <= 3.0
    assert main(["plan", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["learning_rate"] is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["plan.json", "--clip", "2"], "a file takes no --clip"),
        ([*BUDGET, "--sampler", "shuffled"], "a suggestion takes no --sampler"),
        ([*BUDGET[:6]], "a suggestion needs --delta"),
        ([*SETTINGS, "--epsilon", "2"], "a suggestion needs --num-parameters"),
        ([*SETTINGS[:4], *SETTINGS[6:]], "a plan of settings needs --noise-multiplier"),
    ],
)
def test_options_of_several_ways_to_a_plan_are_refused(given, message, capsys):
    assert main(["plan", *given]) == 2
    assert message in capsys.readouterr().err


def test_the_commands_of_the_pages_parse():
    pages = [path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]]
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", "\n".join(pages), re.DOTALL | re.MULTILINE)
    found = re.findall(r"^dpoptax (.*)$", "\n".join(blocks).replace("\\\n", " "), re.MULTILINE)
    assert len(found) > 8
    for command in found:
        # Up to the next program of the shell.
        words = shlex.split(re.split(r" (?:&&|\|) ", command)[0])
        assert _parser().parse_args(words).run
