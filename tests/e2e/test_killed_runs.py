"""Runs that are killed by SIGKILL at random moments: no release is uncharged, no noise is reused.

Each process writes down what it releases, for itself and past the journal. The data make the sum of
the clipped gradients known: all examples pull in one direction, and every batch has all of them. So
the noise of a release can be computed from it.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
STEPS, EXAMPLES, SIZE = 100, 8, 4
# The data of the runs: the same examples with another sign.
SIGNS = {"plus": 1.0, "minus": -1.0}

PROGRAM = f"""
import json, os, sys, time
import jax, jax.numpy as jnp, numpy as np, optax
import dpoptax
from dpoptax.training import Checkpoints, Every, PrivateRun, fit

how, folder, records, sign = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
out = os.open(records, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def record(params):
    row = [sign, *np.asarray(params, np.float64).tolist()]
    os.write(out, (json.dumps(row) + chr(10)).encode())
    time.sleep(0.005)  # so that a kill comes before the end

# The parameters after a step are the release of the step.
only_release = optax.GradientTransformation(
    lambda params: optax.EmptyState(),
    lambda updates, state, params: (updates - params, state),
)
plan = dpoptax.Plan(
    sampler=dpoptax.samplers.Poisson({EXAMPLES}, {EXAMPLES}), clip=1.0, noise_multiplier=50.0,
    num_steps={STEPS}, delta=1e-3)
run = dict(plan=plan, optimizer=only_release, key=jax.random.key(0),
           resume=Checkpoints(folder, every_seconds=0.05))
data = np.full(({EXAMPLES}, {SIZE}), sign, np.float32)
loss_fn = lambda params, x: jnp.vdot(params, x)
print("open", flush=True)
if how == "fit":
    show = Every(lambda progress: record(progress.params), steps=1)
    result = fit(loss_fn, jnp.zeros({SIZE}), data, progress=show, **run)
    charged = result.ledger.num_steps
else:
    with PrivateRun(loss_fn, jnp.zeros({SIZE}), data, **run) as result:
        for info in result:
            record(result.params)
    charged = result.ledger.num_steps
print(json.dumps(charged), flush=True)
"""


def rows_of(path):
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("]")]


def check(rows, charged):
    """Raises if more was released than charged, or if two releases share their noise."""
    distinct = sorted({tuple(row) for row in rows})
    assert len(distinct) <= charged, f"{len(distinct)} releases, and {charged} were charged"
    released = np.array(distinct)
    # Each of the examples contributes a vector of norm 1, times its sign.
    sums = released[:, :1] * EXAMPLES / np.sqrt(SIZE)
    noise = released[:, 1:] * EXAMPLES - sums
    distances = np.abs(noise[:, None] - noise[None]).max(axis=-1) + 1e3 * np.eye(len(noise))
    assert distances.min() > 1e-3, "two releases have the same noise"


def start(how, folder, records, sign):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, how, folder, records, str(sign)]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip


def kill_at_random(process, records, moment):
    """Kills a process a random while after it opened its run, or after it released some steps."""
    before = len(rows_of(records))
    process.stdout.readline()
    wanted = before + moment.choice([0, 1, 3, 8])
    while process.poll() is None and len(rows_of(records)) < wanted:
        time.sleep(0.001)
    time.sleep(moment.uniform(0, 0.05) if wanted > before else moment.uniform(0, 1.0))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def kill_and_resume(how, folder, names, seed):
    """Kills a run once per name but the last, which finishes it; returns what was seen."""
    moment, records, killed = random.Random(seed), folder / f"{how}.jsonl", 0
    *first, last = names
    for name in first:
        process = start(how, folder / how, records, SIGNS[name])
        killed += kill_at_random(process, records, moment)
    output, error = start(how, folder / how, records, SIGNS[last]).communicate()
    assert output.count("\n") == 2, error[-2000:]
    return rows_of(records), int(output.splitlines()[1]), killed


def assert_killed_runs_are_safe(folder, names, seed):
    found = {}

    def work(how):
        found[how] = kill_and_resume(how, folder, names, seed)

    # Both at once: most of the time goes into starting processes.
    threads = [threading.Thread(target=work, args=[how]) for how in ("fit", "run")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for how in ("fit", "run"):
        rows, charged, killed = found[how]
        assert killed >= 1, (how, seed)
        assert charged >= STEPS, (how, seed)
        check(rows, charged)


@pytest.mark.e2e
@pytest.mark.slow
def test_killed_runs_charge_every_release_and_never_reuse_noise(tmp_path):
    assert_killed_runs_are_safe(tmp_path, ["plus", "plus", "minus"], seed=int(time.time()))


@pytest.mark.nightly
def test_runs_that_are_killed_many_times(tmp_path):
    names = [random.Random(number).choice(list(SIGNS)) for number in range(12)]
    assert_killed_runs_are_safe(tmp_path, names, seed=int(time.time()))


def test_the_check_finds_an_uncharged_release_and_reused_noise():
    noise = np.arange(24.0).reshape(6, SIZE)
    sums = EXAMPLES / np.sqrt(SIZE)
    rows = [[1.0, *((line + sums) / EXAMPLES)] for line in noise]
    check(rows + rows[:3], 6)  # a step that is repeated is the same release
    with pytest.raises(AssertionError, match="6 releases, and 5 were charged"):
        check(rows, 5)
    with pytest.raises(AssertionError, match="the same noise"):
        check([*rows, [-1.0, *((noise[2] - sums) / EXAMPLES)]], 99)
