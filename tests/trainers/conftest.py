"""Programs that use dpoptax inside another library, each in an environment of its own."""

import hashlib
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv-trainers"


def _python_with(requirements, without_dependencies=()):
    """Returns the interpreter of an environment with dpoptax and these packages."""
    packages = repr((sys.version, requirements, without_dependencies))
    name = hashlib.sha256(packages.encode()).hexdigest()[:12]
    folder = ENVIRONMENTS / name
    python, done = folder / "bin" / "python", folder / "done"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "--editable", ROOT, *requirements], check=True)
        if without_dependencies:
            subprocess.run([*install, "--no-deps", *without_dependencies], check=True)
        done.touch()
    return python


@pytest.fixture(scope="session")
def run_program():
    """`run_program(requirements, source)` runs a program and returns what it printed."""

    def run(requirements, source, *arguments, without_dependencies=()):
        python = _python_with(tuple(requirements), tuple(without_dependencies))
        # Not the settings of the tests: the program must run as a user's does.
        ours = ("JAX_", "XLA_", "PYTEST_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        done = subprocess.run(
            [python, "-c", source, *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
