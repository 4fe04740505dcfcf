"""Runs with correlated noise: crashes, new keys, adapters and devices keep its correlations."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eight_devices import run_on_eight_devices
from strategies import CORRELATED, Taps, recorded, whitened

import dpoptax
from dpoptax import transforms
from dpoptax.training import Checkpoints, PrivateRun
from dpoptax.training._charges import charge_steps, ledger_of_run
from dpoptax.training._resume.run import _rekeyed

ROOT = pathlib.Path(__file__).parents[2]
every = pytest.mark.parametrize("name", CORRELATED)
# The second one in the slow tests only.
taps_first = pytest.mark.parametrize(
    "name", ["taps", pytest.param("recursion", marks=pytest.mark.slow)]
)
SAMPLERS = {
    "taps": dpoptax.samplers.Shuffled(64, 8),
    "recursion": dpoptax.samplers.CyclicPoisson(64, 8, 4, max_batch_size=16),
}
DATA = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)


def loss_fn(params, x):
    return jnp.sum((params["w"] - x) ** 2)


def plan(name, **changes):
    fields = {
        "sampler": SAMPLERS[name],
        "clip": 1.0,
        "noise_multiplier": 1.0,
        "num_steps": 10,
        "delta": 1e-4,
        "mechanism": CORRELATED[name](),
    }
    return dpoptax.Plan(**fields | changes)


def open_run(name, folder=None, loss=loss_fn, optimizer=None, **changes):
    return PrivateRun(
        loss,
        {"w": jnp.zeros(3)},
        DATA,
        plan=plan(name, **changes),
        optimizer=optimizer or optax.sgd(0.1, momentum=0.9),
        key=jax.random.key(0),
        resume=None if folder is None else Checkpoints(folder, every_seconds=1e9),
    )


def steps_of(run, number):
    """Makes steps; returns the parameters after each."""
    found = []
    for _ in range(number):
        run.step()
        found.append(np.asarray(run.params["w"]))
    return found


def crash(folder, name, **changes):
    """A folder whose last checkpoint is of step 4 of 7; returns the parameters after each step."""
    with open_run(name, folder, **changes) as run:
        rows = steps_of(run, 4)
        run.save()
        shutil.copytree(folder / "checkpoints", folder.parent / "before")
        rows += steps_of(run, 3)
    shutil.rmtree(folder / "checkpoints")
    (folder.parent / "before").rename(folder / "checkpoints")
    return rows


@pytest.mark.seconds
@taps_first
def test_steps_that_a_crash_lost_are_repeated_bit_for_bit_and_count_once(tmp_path, name):
    whole = steps_of(open_run(name), 10)
    rows = crash(tmp_path / "run", name)
    np.testing.assert_array_equal(rows, whole[:7])
    with open_run(name, tmp_path / "run") as run:
        assert run.steps_done == 4
        assert run.ledger.runs == [(1.0, 7)]
        np.testing.assert_array_equal(steps_of(run, 6), whole[4:])
        assert run.ledger.runs == [(1.0, 10)]


@pytest.mark.seconds
def test_another_strategy_is_refused_by_name_and_so_is_another_program(tmp_path):
    name = "recursion"
    crash(tmp_path / "run", name)
    strategy = CORRELATED[name]().strategy
    other = attrs.evolve(strategy, numbers=(*strategy.numbers[:-1], 0.1))
    for mechanism in (dpoptax.mechanisms.Correlated(other), dpoptax.mechanisms.Gaussian()):
        with pytest.raises(ValueError, match="holds a run with another mechanism"):
            open_run(name, tmp_path / "run", mechanism=mechanism)
    with pytest.raises(ValueError, match="ties the steps of a run together"):
        open_run(name, tmp_path / "run", loss=lambda params, x: 2 * loss_fn(params, x))


@taps_first
def test_new_keys_after_a_crash_keep_the_noise_that_was_released(name):
    """The run before and after is one matrix times independent noise, and nothing is repeated."""
    mechanism = CORRELATED[name]()
    change = lambda step, state: _rekeyed(state, "another program") if step == 3 else state  # noqa: E731
    white, other = (
        whitened(mechanism, recorded(mechanism, steps=6, params=jnp.zeros(2000), **options))
        for options in ({}, {"change": change})
    )
    np.testing.assert_allclose(other[:3], white[:3], atol=1e-4)
    rows = np.concatenate([white, other[3:]])
    assert np.abs(rows @ rows.T / 2000 - np.eye(9)).max() < 5 * np.sqrt(2 / 2000)


def test_steps_that_are_not_repeated_count_as_a_further_run():
    planned = plan("taps")
    ledger = ledger_of_run(planned, 5, [(4, 7), (5, 6)])
    assert ledger.runs == [(1.0, 7), (1.0, 6), (1.0, 5)]
    charge_steps(ledger, planned, 5, 10)
    assert ledger.runs == [(1.0, 7), (1.0, 6), (1.0, 10)]


@pytest.mark.slow
def test_a_changed_program_under_a_strategy_of_one_band_counts_a_further_run(tmp_path):
    changes = {
        "sampler": dpoptax.samplers.Poisson(64, 8),
        "mechanism": dpoptax.mechanisms.Correlated(Taps((1.0,))),
    }
    crash(tmp_path / "run", "taps", **changes)
    with pytest.warns(RuntimeWarning, match="3 steps that ran after it stay charged"):
        run = open_run(
            "taps", tmp_path / "run", loss=lambda params, x: 2 * loss_fn(params, x), **changes
        )
    with run:
        assert run.ledger.runs == [(1.0, 7), (1.0, 4)]
        run.step(6)
        assert run.ledger.runs == [(1.0, 7), (1.0, 10)]


def test_a_plan_of_more_steps_than_the_strategy_is_refused():
    assert plan("taps", num_steps=12).num_steps == 12
    for call in (lambda: plan("taps", num_steps=13), lambda: plan("taps").replace(num_steps=13)):
        with pytest.raises(ValueError, match=r"12 steps.*13"):
            call()


@every
def test_a_plan_is_written_and_read(name):
    planned = plan(name)
    classes = [type(planned.mechanism.strategy)]
    assert dpoptax.Plan.from_json(planned.to_json(), classes=classes) == planned


@pytest.mark.slow
@every
def test_fit_gives_the_numbers_of_a_run_and_its_report_names_the_noise(name):
    result = dpoptax.training.fit(
        loss_fn, {"w": jnp.zeros(3)}, DATA, plan=plan(name),
        optimizer=optax.sgd(0.1, momentum=0.9), key=jax.random.key(0), progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(result.params["w"], steps_of(open_run(name), 10)[-1])
    report = str(result.report())
    assert "correlated with that of the other steps" in report
    assert type(plan(name).mechanism.strategy).__name__ in report


OPTIMIZERS = {
    "scale_then_privatize": lambda: transforms.scale_then_privatize(optax.sgd(0.1)),
    "disk": lambda: transforms.disk(optax.sgd(0.1)),
    "adam_bc": lambda: optax.chain(transforms.scale_by_adam_bc(), optax.scale(-0.1)),
}


@pytest.mark.slow
@every
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_that_act_before_the_clip_or_know_the_noise(name, optimizer):
    rows = steps_of(open_run(name, optimizer=optimizer()), 5)
    assert np.isfinite(rows).all()
    assert len(np.unique(rows)) == 15


@taps_first
def test_gradients_of_the_caller(name):
    run = open_run(name, loss=None)
    grads_fn = jax.jit(dpoptax.per_example_grads(loss_fn))
    for _ in range(3):
        run.apply(grads_fn(run.params, run.sample()))
    assert np.isfinite(run.params["w"]).all()
    assert run.ledger.runs == [(1.0, 3)]


@pytest.mark.slow
@every
def test_the_optimizer_of_nnx_and_the_placeholder_of_optax(name):
    from flax import nnx

    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    tx = optax.chain(plan(name).privatize(jax.random.key(0)), optax.trace(0.9))
    optimizer = dpoptax.nnx.Optimizer(model, tx, wrt=nnx.Param)
    loss, params = dpoptax.nnx.loss_fn(model, lambda model, x: jnp.sum(model(x) ** 2))
    grads = dpoptax.per_example_grads(loss)(params, DATA[:8])
    for _ in range(3):
        optimizer.update(model, grads)
    assert np.isfinite(model.kernel[...]).all()

    tx = optax.chain(plan(name).privatize(jax.random.key(0)), optax.trace(0.9))
    state = tx.init({"w": jnp.zeros(3)})
    doubled = optax.tree_map_params(tx, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    assert doubled[1].trace["w"].tolist() == [1, 1, 1]


@pytest.mark.slow
def test_the_size_of_microbatches_is_chosen_and_changes_no_noise():
    rows = []
    for size in (None, "auto", 4):
        result = dpoptax.training.fit(
            loss_fn, {"w": jnp.zeros(3)}, DATA, plan=plan("recursion"), optimizer=optax.sgd(0.1),
            key=jax.random.key(0), progress=False, microbatch_size=size,
        )  # fmt: skip
        rows.append(np.asarray(result.params["w"]))
    np.testing.assert_allclose(rows[1:], [rows[0]] * 2, rtol=1e-4, atol=1e-5)


DEVICES = """
import sys; sys.path.insert(0, "tests")
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import dpoptax
from strategies import CORRELATED

assert jax.device_count() == 8
x = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
start = {"a": np.full((16, 32), 0.1, np.float32), "b": np.full((32,), 0.1, np.float32)}
samplers = {
    "taps": dpoptax.samplers.Shuffled(64, 16),
    "recursion": dpoptax.samplers.CyclicPoisson(64, 8, 4, max_batch_size=16)}

def loss_fn(params, row):
    return jnp.vdot(jnp.tanh(row @ params["a"]), params["b"]) ** 2

def equal(one, many):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

def assert_spread(state, params):
    # The past noises of a parameter, along a leading axis, are sharded as the parameter is.
    if isinstance(state.inner, dict):
        for leaf, param in zip(*map(jax.tree.leaves, (state.inner["past"], params)), strict=True):
            assert leaf.sharding.shard_shape(leaf.shape)[1:] == param.sharding.shard_shape(
                param.shape), leaf.sharding

def own_loop(name, params, rows):
    tx = dpoptax.privatize(1.0, 1.0, expected_batch_size=8, key=jax.random.key(3),
                           mechanism=CORRELATED[name]())
    @jax.jit
    def step(params, state, rows):
        grads = dpoptax.per_example_grads(loss_fn)(params, rows)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state
    state = tx.init(params)
    assert_spread(state.mechanism_state, params) if isinstance(
        params["a"].sharding, NamedSharding) else None
    for _ in range(3):
        params, state = step(params, state, rows)
    return params, state.mechanism_state

for name in CORRELATED:
    plan = dpoptax.Plan(sampler=samplers[name], clip=1.0, noise_multiplier=1.0, num_steps=6,
                        delta=1e-4, mechanism=CORRELATED[name]())
    def train(params, data):
        return dpoptax.training.fit(loss_fn, params, data, plan=plan, optimizer=optax.sgd(0.5),
                                    key=jax.random.key(0), progress=False)
    one, (loop, _) = train(start, x), own_loop(name, jax.tree.map(jnp.asarray, start), x[:16])
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(kind,))
        spread = NamedSharding(mesh, P("data"))
        params = jax.device_put(start, {"a": NamedSharding(mesh, P(None, "data")), "b": spread})
        found, state = own_loop(name, params, jax.device_put(x[:16], spread))
        equal(loop, found)
        assert_spread(state, params)
        if kind is AxisType.Auto:  # with explicit axes a run is another program
            over = dpoptax.samplers.sharded_take(spread)
            many = train(params, dpoptax.training.DeviceData(jax.device_put(x, spread), over))
            equal(one.params, many.params)
            assert_spread(many.state.opt_state[0].mechanism_state, params)
print("eight as one")
"""


@pytest.mark.e2e
def test_eight_devices_draw_what_one_draws_and_spread_the_state():
    assert "eight as one" in run_on_eight_devices(DEVICES)


KILLED = """
import json, os, sys, time
sys.path.insert(0, "tests")
import jax, jax.numpy as jnp, numpy as np, optax
import dpoptax
from dpoptax.training import Checkpoints, PrivateRun
from strategies import CORRELATED, Recursion, Taps, only_release

folder, records, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
out = os.open(records, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
plan = dpoptax.Plan(
    sampler=dpoptax.samplers.Shuffled(8, 4), clip=1.0, noise_multiplier=1.0, num_steps=60,
    delta=1e-3, mechanism=dpoptax.mechanisms.Correlated(Taps((1.0, -0.5, -0.25), 60)))
with PrivateRun(lambda params, x: jnp.vdot(params, x), jnp.zeros(4), np.ones((8, 4), np.float32),
                plan=plan, optimizer=only_release, key=jax.random.key(0),
                resume=Checkpoints(folder, every_seconds=0.05)) as run:
    for _ in run:
        os.write(out, (json.dumps([run.steps_done, *map(float, run.params)]) + chr(10)).encode())
        time.sleep(pause)
print(json.dumps(run.ledger.runs))
"""


@pytest.mark.e2e
def test_a_killed_run_releases_what_one_that_was_not_killed_releases(tmp_path):
    def start(name, pause):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        arguments = [tmp_path / name, tmp_path / f"{name}.jsonl", pause]
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", KILLED, *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip

    def rows(name):
        path = tmp_path / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return {tuple(json.loads(line)) for line in lines if line.endswith("]")}

    process = start("killed", 0.02)
    while process.poll() is None and len(rows("killed")) < 20:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    for name, pause in (("killed", 0.0), ("whole", 0.0)):
        output, error = start(name, pause).communicate()
        assert output == "[[1.0, 60]]\n", error[-2000:]
    assert len(rows("whole")) == 60
    assert rows("killed") == rows("whole")
