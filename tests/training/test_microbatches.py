"""Microbatches in a compiled step: no work is done twice, and no example moves between devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eight_devices import run_on_eight_devices

import dpoptax
from dpoptax.per_example._api import deferred_values_and_grads

PROGRAM = """
import re, jax, jax.numpy as jnp, numpy as np, optax, dpoptax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from dpoptax.per_example._api import deferred_values_and_grads

x = np.asarray(jax.random.normal(jax.random.key(1), (64, 3, 16)))
mask = np.asarray(jax.random.bernoulli(jax.random.key(3), 0.5, (64,)))
params = {"w": 0.3 * jax.random.normal(jax.random.key(0), (16, 32))}
tx = dpoptax.privatize(1.0, 0.0, expected_batch_size=1.0, key=jax.random.key(0))

def loss_fn(p, x):
    return jnp.sum(jnp.tanh(x @ p["w"]) ** 2)

def make(size, shards=None):
    both = deferred_values_and_grads(loss_fn, microbatch_size=size, shards=shards)

    def step(params, x, mask):
        values, grads = both(params, x, mask=mask)
        return tx.update(grads, tx.init(params), params)[0], values()

    return jax.jit(step)

one = make(None)(params, x, mask)
MOVES = "all-to-all|collective-permute|all-gather"

def moves(mesh, rows, step):
    batch = jax.device_put((x, mask), NamedSharding(mesh, rows))
    weights = jax.device_put(params, NamedSharding(mesh, P()))
    compiled = step.lower(weights, *batch).compile()
    for a, b in zip(jax.tree.leaves(compiled(weights, *batch)), jax.tree.leaves(one)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    return re.findall(rf" ({MOVES})(?:-start)?\\(", compiled.as_text())

for kind in (AxisType.Auto, AxisType.Explicit):
    line = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    grid = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    # Microbatches of 24 leave a part that copies of rows fill.
    for mesh, rows, size in (
        (line, P("data"), 24), (grid, P(("b", "a")), 16), (grid, P("a"), 4)
    ):
        assert not moves(mesh, rows, make(size)), (kind, rows)
# Rows in the order of the batch would move, so the check above has power.
assert moves(grid, P("a"), make(16, shards=1))

batch = jax.device_put((x, mask), NamedSharding(line, P("data")))
try:
    make(12)(params, *batch)
except ValueError as error:
    assert "must be a multiple of 8, the number of devices" in str(error), error
else:
    raise AssertionError("twelve rows of eight devices were accepted")

# The choice of the size counts the memory of one device.
def wide_loss(p, x):
    return jnp.sum(jnp.cumsum(p * x) ** 2)

def choose(size, **options):
    return dpoptax.training.choose_microbatch_size(
        wide_loss, jax.ShapeDtypeStruct((100_000,), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.float32), max_batch_size=size, memory_limit=3 * 10**6,
        **options)

assert choose(4) == 2
assert choose(32, sharding=NamedSharding(line, P("data"))) == 8 * 2

data = dpoptax.training.DeviceData(
    jax.device_put(x, NamedSharding(line, P("data"))),
    dpoptax.samplers.sharded_take(NamedSharding(line, P("data"))))
plan = dpoptax.Plan(sampler=dpoptax.samplers.Poisson(64, 16, max_batch_size=32), clip=1.0,
                    noise_multiplier=1.0, num_steps=1, delta=1e-3)
try:
    dpoptax.training.fit(loss_fn, params, data, plan=plan, optimizer=optax.sgd(0.1),
                         key=jax.random.key(0), progress=False, microbatch_size=12)
except ValueError as error:
    assert "Pass 16, say" in str(error), error
else:
    raise AssertionError("fit took twelve rows of eight devices")
print("nothing moves")
"""


@pytest.mark.e2e
def test_microbatches_take_the_rows_of_a_device_where_they_are():
    printed = run_on_eight_devices(PROGRAM, JAX_NUMPY_DTYPE_PROMOTION="strict")
    assert "nothing moves" in printed


@pytest.mark.slow
def test_a_compiled_step_runs_the_forward_pass_of_an_example_once():
    """XLA counts the body of a loop once, so this is the work for one microbatch."""
    width, tokens, size = 128, 32, 4
    rule = dpoptax.clipping.FlatClip(1.0)
    forward = 2 * size * tokens * width**2

    def loss_fn(w, x):
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    both = deferred_values_and_grads(loss_fn, microbatch_size=size)

    def forward_passes(function):
        w = jax.ShapeDtypeStruct((width, width), jnp.float32)
        x = jax.ShapeDtypeStruct((2 * size, tokens, width), jnp.float32)
        compiled = jax.jit(lambda w, x: function(*both(w, x))).lower(w, x).compile()
        return compiled.cost_analysis()["flops"] / forward

    def all_readings(values, grads):
        return grads.clip_and_sum(rule.weights), values(), grads.squared_norms()

    alone = forward_passes(lambda _, grads: grads.clip_and_sum(rule.weights))
    assert forward_passes(all_readings) == pytest.approx(alone, abs=0.1)
    # What is not used is not computed.
    assert forward_passes(lambda values, _: values()) == pytest.approx(1, abs=0.1)
    early = forward_passes(lambda values, grads: (values(), grads.clip_and_sum(rule.weights)))
    assert early == pytest.approx(alone + 1, abs=0.1)


@pytest.mark.slow
def test_examples_that_are_not_finite_are_counted_in_microbatches_too():
    data = np.ones((40, 2), np.float32)
    data[:4] = np.nan
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.FixedSize(40, 40), clip=1.0, noise_multiplier=1.0, num_steps=2,
        delta=1e-3,
    )  # fmt: skip
    result = dpoptax.training.fit(
        lambda w, x: jnp.sum((w - x) ** 2), jnp.zeros(2), data, plan=plan,
        optimizer=optax.sgd(0.1), key=jax.random.key(0), progress=False, microbatch_size=8,
    )  # fmt: skip
    assert result.nonprivate_nonfinite_count == 8
