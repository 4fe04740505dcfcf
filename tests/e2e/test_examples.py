"""The examples run as a user runs them, and refuse what they cannot do in one line."""

import math
import os
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

# One worker runs them all: what one test compiled serves the next.
pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("examples")]

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = {"01_logistic_regression.py": "logistic_regression", "05_vae.py": "vae"}


def run(script, *arguments, cwd, **environment):
    # A new process, so that the settings of the tests cannot hide a fault of the example.
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def run_here(monkeypatch, capsys, tmp_path):
    """Like `run`, in this process, which has imported JAX and compiled the example before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))

    def run_here(script, *arguments):
        path = str(ROOT / "examples" / script)
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        capsys.readouterr()
        code = 0
        try:
            with jax.numpy_dtype_promotion("standard"):  # the default outside these tests
                runpy.run_path(path, run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        if isinstance(code, str):  # as the interpreter does at its end
            print(code, file=sys.stderr)
            code = 1
        return subprocess.CompletedProcess(sys.argv, code, *capsys.readouterr())

    return run_here


def check_output(done, folder, picture):
    assert done.returncode == 0, done.stderr
    values = {
        name: float(re.search(rf"^  {name} +(-?[\d.]+)$", done.stdout, re.MULTILINE).group(1))
        for name in ("private", "not private", "untrained")
    }
    assert all(map(math.isfinite, values.values()))
    assert re.search(r"Guarantee +\([\d.]+, [\d.e-]+\)-differential privacy", done.stdout)
    path = folder / "pictures" / picture
    assert str(path.relative_to(folder)) in done.stdout
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 300
    assert pixels.std() > 10
    return values


@pytest.mark.parametrize(("script", "name"), EXAMPLES.items())
def test_an_example_prints_numbers_and_a_statement_and_draws(script, name, tmp_path):
    done = run(script, "--steps", "40", "--out", "pictures", "--seed", "0", cwd=tmp_path)
    dataset = "digits" if name == "vae" else "breast-cancer"
    values = check_output(done, tmp_path, f"{name}_{dataset}.png")
    better = values["private"] < values["untrained"] if name == "vae" else values["private"] > 70
    assert better
    assert "40 done of 40 planned" in done.stdout
    assert "ε = " in done.stderr


def test_the_samplers_are_compared_and_drawn(tmp_path):
    done = run("02_which_sampler.py", "--curve", "1.1", "--out", "pictures", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    costs = [
        float(value) for value in re.findall(r"epsilon = +([\d.]+)$", done.stdout, re.MULTILINE)
    ]
    assert costs == [0.89, 1.54, 3.38, 6.29, 0.87, 24.92]
    with Image.open(tmp_path / "pictures" / "which_sampler.png") as image:
        assert min(image.size) > 300


def test_a_script_of_d3p_runs_by_its_imports(tmp_path):
    done = run("06_from_d3p.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    accuracy, epsilon = map(float, re.search(r"([\d.]+) %, epsilon ([\d.]+)", done.stdout).groups())
    assert accuracy > 85
    assert 1.9 < epsilon <= 2


def test_a_convolutional_network_is_trained_and_taken_up(run_here, tmp_path):
    arguments = ("--seed", "0", "--out", "pictures", "--resume", "run", "--quiet")
    done = run("03_mnist_cnn.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    private, untrained = (
        float(re.search(rf"^  {name} +([\d.]+)$", done.stdout, re.MULTILINE)[1])
        for name in ("private", "untrained")
    )
    assert private > 70 > 30 > untrained
    assert "225 done of 225 planned" in done.stdout
    with Image.open(tmp_path / "pictures" / "cnn_digits.png") as image:
        assert min(image.size) > 300
    again = run_here("03_mnist_cnn.py", *arguments)
    assert again.stdout == done.stdout
    other = run_here("03_mnist_cnn.py", *arguments, "--l2-clip", "2")
    assert other.returncode == 2
    assert "holds a run with another clip" in other.stderr


def test_adapters_are_trained_beside_a_frozen_backbone(tmp_path):
    done = run("04_adapters.py", "--seed", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = (
        float(re.search(rf"^  {name} +([\d.]+)$", done.stdout, re.MULTILINE)[1])
        for name in ("before", "after")
    )
    assert before < 35
    assert after > 60
    trained, frozen = re.search(r"Adapting ([\d,]+) parameters; ([\d,]+)", done.stdout).groups()
    assert int(trained.replace(",", "")) < 0.2 * int(frozen.replace(",", ""))
    assert re.search(r"epsilon (1\.9\d\d|2\.000) at delta 1e-05, 100 steps", done.stdout)


@pytest.mark.parametrize("attack", ["gradients", "loss"])
def test_an_audit_stays_below_the_guarantee_and_is_drawn(attack, run_here, tmp_path):
    arguments = ("--attack", attack, "--steps", "20", "--out", "pictures", "--seed", "0", "--quiet")
    done = run_here("08_audit.py", *arguments, "--canaries", "400")
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    if attack == "loss":  # few steps show this attack little, and often nothing
        words = words.replace("reached no epsilon above 0", "reached at least epsilon 0")
    reached, guarantee = map(
        float, re.search(r"at least epsilon ([\d.]+) .*? guarantee is ([\d.]+)\.", words).groups()
    )
    assert reached < guarantee <= 4
    assert reached > 1.5 or attack == "loss"
    with Image.open(tmp_path / "pictures" / "audit_digits.png") as image:
        assert min(image.size) > 300


def test_a_seed_repeats_a_run_and_no_seed_does_not(run_here):
    def losses(script, *arguments):
        options = ("--steps", "5", "--quiet", "--out", "pictures")
        return run_here(script, *options, *arguments).stdout

    first = losses("05_vae.py", "--seed", "3")
    assert first == losses("05_vae.py", "--seed", "3")
    assert first != losses("05_vae.py")
    script = "01_logistic_regression.py"
    assert losses(script) != losses(script)


BAD_OPTIONS = {
    "epsilon": (("--epsilon", "-1"), "epsilon must be positive"),
    "delta": (("--delta", "2"), "delta must lie strictly between 0 and 1"),
    "rate": (("--batch-size", "0.1"), "For a sampling rate of 0.1"),
    "batch": (("--batch-size", "99999"), "cannot exceed num_examples"),
    "clip": (("--l2-clip", "0"), "clip bounds a norm"),
    "steps": (("--steps", "0"), "num_steps must be at least 1"),
    "word": (("--steps", "many"), "invalid int value"),
    "dataset": (("--dataset", "cats"), "invalid choice"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_refused_in_one_line(arguments, message, run_here):
    done = run_here("05_vae.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_example_on_synthetic_data_learns_from_them(run_here, tmp_path):
    pytest.importorskip("mbi")
    done = run_here("09_synthetic_data.py", "--rows", "4000", "--seed", "0", "--out", "made")
    assert done.returncode == 0, done.stderr
    real, synthetic = (
        float(re.search(rf"trained on {kind} rows +([\d.]+) %", done.stdout).group(1))
        for kind in ("real", "synthetic")
    )
    # The larger class has 52 %.
    assert 60 < synthetic < real + 2
    assert {"synthetic_1.csv", "two_way.png"} <= {
        path.name for path in (tmp_path / "made").iterdir()
    }


def test_adult_without_its_files_is_refused_in_one_line(run_here):
    missing = ("--dataset", "adult", "--data-dir", "nowhere")
    for arguments in (missing, missing[:2]):
        done = run_here("01_logistic_regression.py", *arguments)
        assert done.returncode != 0
        assert len(done.stderr.strip().splitlines()) == 1
        assert "adult.data" in done.stderr


def test_mnist_that_cannot_be_had_is_refused_in_one_line(tmp_path):
    proxy = "http://127.0.0.1:9"  # where nobody listens
    done = run(
        "05_vae.py", "--dataset", "mnist", cwd=tmp_path, TFDS_DATA_DIR=str(tmp_path / "empty"),
        http_proxy=proxy, https_proxy=proxy, HTTP_PROXY=proxy, HTTPS_PROXY=proxy,
        no_proxy="", NO_PROXY="",
    )  # fmt: skip
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert "TFDS_DATA_DIR" in line
    assert "--dataset digits" in line


def test_mnist_from_a_prepared_copy(tmp_path):
    folder = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    if not (folder / "mnist").is_dir():
        pytest.skip(f"no prepared MNIST in {folder}; TFDS_DATA_DIR names another folder")
    arguments = ("--dataset", "mnist", "--steps", "20", "--out", "pictures")
    done = run("05_vae.py", *arguments, cwd=tmp_path, TFDS_DATA_DIR=str(folder.resolve()))
    values = check_output(done, tmp_path, "vae_mnist.png")
    assert values["private"] < values["untrained"]
    assert "60000 examples" in done.stdout


def test_adult_from_its_files(tmp_path):
    folder = os.environ.get("DPOPTAX_ADULT_DIR")
    if folder is None:
        pytest.skip("DPOPTAX_ADULT_DIR does not name a folder with adult.data and adult.test")
    arguments = ("--dataset", "adult", "--data-dir", str(pathlib.Path(folder).resolve()))
    done = run(
        "01_logistic_regression.py", *arguments, "--steps", "300", "--out", "pictures", cwd=tmp_path
    )
    values = check_output(done, tmp_path, "logistic_regression_adult.png")
    assert values["private"] > 80
    assert "30162 examples" in done.stdout
