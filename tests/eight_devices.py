"""Programs on eight devices. JAX counts devices once, so each program is a process."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def run_on_eight_devices(program, *arguments, **settings):
    """Runs a program and returns what it printed. `settings` are environment variables."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env=os.environ | SETTINGS | settings,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
