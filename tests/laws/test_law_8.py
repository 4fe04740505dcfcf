"""Law 8, grey-box: every draw of several runs, restarts and devices is recorded and compared.

Gradients of zero release nothing but noise, so a release is a record of what was drawn.
"""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import dpoptax
from dpoptax import mechanisms

PARAMS = {"a": jnp.zeros(64), "b": jnp.zeros((8, 8)), "c": jnp.zeros(())}
KEYS = {"threefry": jax.random.key, "chacha20": dpoptax.random.insecure_key}
keys = pytest.mark.parametrize("make", KEYS.values(), ids=KEYS)


def transformation(key, clip=1.0, noise_multiplier=1.0, size=1.0, **options):
    return dpoptax.privatize(clip, noise_multiplier, expected_batch_size=size, key=key, **options)


def record(tx, state, num_steps, params=PARAMS):
    """Runs some steps; returns the state, and a row of noise for every leaf and step."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape)), params)
    update = jax.jit(tx.update)
    rows = []
    for _ in range(num_steps):
        noise, state = update(zeros, state, params)
        rows += [np.ravel(leaf) for leaf in jax.tree.leaves(noise)]
    return state, rows


def assert_unrelated(rows, sizes):
    """No row repeats a part of another, whatever factor lies between."""
    long = np.stack([row / row.std() for row in rows if row.size > 1])
    correlations = np.corrcoef(long)[np.triu_indices(len(long), 1)]
    assert np.abs(correlations).max() < 5.5 / np.sqrt(long.shape[1])
    # Of so many values of float32 a few agree by chance; of a shared draw all would.
    values = np.concatenate(rows)
    assert len(np.unique(values)) >= len(values) - 2 - len(values) ** 2 // 2**22
    assert len(rows) == sizes
    assert abs(values.std() - 1) < 4.5 / np.sqrt(2 * len(values))


@keys
def test_steps_leaves_and_runs_draw_apart(make):
    rows = []
    for seed in range(3):
        tx = transformation(make(seed))
        for _ in range(3):  # `init` called again
            rows += record(tx, tx.init(PARAMS), 4)[1]
    assert_unrelated(rows, 3 * 3 * 4 * 3)


CHANGES = {
    "clip": {"clip": 0.5},
    "noise": {"noise_multiplier": 2.0},
    "size": {"size": 2.0},
    "mechanism": {"mechanism": mechanisms.Gaussian(num_draws=2)},
    "exact": {"mechanism": mechanisms.DiscreteGaussian()},
}


def restored(state, path):
    """A state as another process would find it."""

    def plain(leaf):
        return (
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )

    implementation = jax.random.key_impl(state.key)
    with jax.numpy_dtype_promotion("standard"), ocp.StandardCheckpointer() as checkpointer:
        saved = jax.tree.map(plain, state)
        checkpointer.save(path, saved)
        checkpointer.wait_until_finished()
        found = checkpointer.restore(path, jax.tree.map(jnp.zeros_like, saved))
    return found._replace(key=jax.random.wrap_key_data(found.key, impl=implementation))


@keys
def test_a_restored_run_goes_on_bit_for_bit_and_a_changed_one_draws_other_noise(make, tmp_path):
    tx = transformation(make(0))
    state, before = record(tx, tx.init(PARAMS), 2)
    _, rest = record(tx, state, 2)
    state = restored(state, tmp_path / "state")
    _, again = record(transformation(make(1)), state, 2)  # the key is the state's
    for row, other in zip(rest, again, strict=True):
        np.testing.assert_array_equal(row, other)
    rows = before + rest
    for change in CHANGES.values():
        changed = transformation(make(0), **change)
        scale = change.get("clip", 1) * change.get("noise_multiplier", 1) / change.get("size", 1)
        rows += [row / scale for row in record(changed, state, 2)[1]]
    more = PARAMS | {"d": jnp.zeros(64)}  # a model with one leaf more
    rows += record(tx, state, 2, more)[1]
    assert_unrelated(rows, 2 * 3 * (2 + len(CHANGES)) + 2 * 4)


DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import dpoptax
assert jax.device_count() == 8
mesh = Mesh(np.array(jax.devices()), ("x",))
rows = {}
for name, make in {"threefry": jax.random.key, "chacha20": dpoptax.random.insecure_key}.items():
    for batch, model in ((P(), P()), (P("x"), P()), (P(), P("x"))):
        tx = dpoptax.privatize(1.0, 1.0, expected_batch_size=1.0, key=make(0), mechanism=MECHANISM)
        params = jax.device_put(jnp.zeros(4096), NamedSharding(mesh, model))
        grads = jax.device_put(jnp.zeros((8, 4096)), NamedSharding(
            mesh, P(None, "x") if model else batch))
        noise, _ = jax.jit(tx.update, out_shardings=(params.sharding, None))(
            grads, tx.init(params), params)
        assert noise.sharding.is_equivalent_to(params.sharding, 1)
        rows.setdefault(name, []).append(np.asarray(noise))
for name, found in rows.items():
    for row in found[1:]:
        np.testing.assert_array_equal(row, found[0])
    parts = np.corrcoef(found[0].reshape(8, 512))[np.triu_indices(8, 1)]
    assert np.abs(parts).max() < 5 / np.sqrt(512), parts
    assert abs(found[0].std() - 1) < 4.5 / np.sqrt(2 * 4096)
print("one noise on one and on eight")
"""


@pytest.mark.e2e
@pytest.mark.parametrize("mechanism", ["Gaussian()", "DiscreteGaussian(bits=12)"])
def test_eight_devices_draw_what_one_draws_and_no_part_of_it_twice(mechanism, tmp_path):
    program = DEVICES.replace("MECHANISM", f"dpoptax.mechanisms.{mechanism}")
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, str(pathlib.Path(tmp_path / "program.py"))],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "one noise on one and on eight" in done.stdout


def combined(first, second):
    return optax.partition(
        {"first": first, "second": second}, {"a": "first", "b": "second", "c": "second"}
    )


@keys
def test_one_key_for_two_transformations_of_one_chain_is_refused(make):
    zeros = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape)), PARAMS)
    tx = combined(transformation(make(0)), transformation(make(0), clip=2.0))
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"given one key.*Split the key"):
        jax.jit(tx.update)(zeros, state, PARAMS)
    tx = combined(transformation(make(0)), transformation(make(1)))
    jax.jit(tx.update)(zeros, tx.init(PARAMS), PARAMS)
    # Without noise there is none to share, and one run after another may be a repetition.
    quiet = [transformation(make(0), noise_multiplier=0.0) for _ in range(2)]
    tx = combined(*quiet)
    tx.update(zeros, tx.init(PARAMS), PARAMS)
    for _ in range(2):
        tx = transformation(make(5))
        tx.update(zeros, tx.init(PARAMS), PARAMS)
