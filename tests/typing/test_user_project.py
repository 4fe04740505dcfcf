"""Pyright in strict mode accepts a user's project, and knows the types of all public names."""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import runpy
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = pathlib.Path(__file__).with_name("user_project")
PROGRAMS = sorted(PROJECT.glob("*.py"))
# Subclasses of NumPyro's classes: their bases are known only where Pyright reads NumPyro's source.
OF_NUMPYRO = {"GaussianMixture", "Predictive"}

needs_pyright = pytest.mark.skipif(
    importlib.util.find_spec("pyright") is None,
    reason="needs pyright: pip install 'pyright[nodejs]'",
)


def pyright(*arguments):
    """Returns what Pyright writes as JSON. It finds dpoptax as an installed package with types."""
    folder = pathlib.Path(sys.executable).parent
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": os.pathsep.join([str(folder), os.environ.get("PATH", "")]),  # its Python
        "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", *map(str, arguments)],
        capture_output=True, text=True, check=False, env=env, cwd=PROJECT,
    )  # fmt: skip
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    return json.loads(done.stdout)


def underlined(problem):
    """Returns the part of a program that Pyright underlines."""
    start, end = problem["range"]["start"], problem["range"]["end"]
    assert start["line"] == end["line"]
    line = pathlib.Path(problem["file"]).read_text().splitlines()[start["line"]]
    return line[start["character"] : end["character"]]


def is_of_another_library(problem, names):
    """Whether the underlined expression is, in the program that ran, an object of JAX, say."""
    try:
        found = eval(underlined(problem), dict(names))
    except (NameError, SyntaxError, AttributeError):
        return False
    module = getattr(found, "__module__", None) or getattr(found, "__name__", "")
    return module.split(".")[0] in ("jax", "optax", "flax")


@pytest.fixture(scope="module")
def problems():
    found = pyright("-p", PROJECT)["generalDiagnostics"]
    return [problem for problem in found if problem["severity"] == "error"]


@needs_pyright
@pytest.mark.e2e
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_strict_pyright_finds_no_error_that_comes_from_our_types(program, problems):
    with jax.numpy_dtype_promotion("standard"), contextlib.redirect_stdout(io.StringIO()):
        names = runpy.run_path(str(program))
    ours = [
        f"{underlined(problem)}: {problem['message']}"
        for problem in problems
        if problem["file"] == str(program) and not is_of_another_library(problem, names)
    ]
    assert not ours


@needs_pyright
@pytest.mark.e2e
def test_wrong_and_unknown_types_are_found(tmp_path):
    program = tmp_path / "wrong.py"
    program.write_text(
        "import dpoptax, jax.numpy as jnp\n"
        "def unknown(x): return x\n"
        "plan = dpoptax.Plan(sampler=3, clip=1.0, noise_multiplier=1.0, num_steps=1, delta=1e-5)\n"
        "value = unknown(jnp.zeros(2))\n"
    )
    (tmp_path / "pyrightconfig.json").write_text((PROJECT / "pyrightconfig.json").read_text())
    found = pyright("-p", tmp_path)["generalDiagnostics"]
    names = {"jnp": jax.numpy, "value": 3}
    ours = {p["rule"] for p in found if not is_of_another_library(p, names)}
    assert {"reportArgumentType", "reportUnknownVariableType"} <= ours
    assert any(is_of_another_library(problem, names) for problem in found)


@needs_pyright
@pytest.mark.e2e
def test_the_types_of_all_public_names_are_known():
    report = pyright("--verifytypes", "dpoptax", "--ignoreexternal")["typeCompleteness"]
    assert report["completenessScore"] > 0.99
    unknown = {symbol["name"] for symbol in report["symbols"] if not symbol["isTypeKnown"]}
    assert {name.split(".")[-1] for name in unknown} <= OF_NUMPYRO
