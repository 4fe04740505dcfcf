"""A mesh with explicit axes, which `jax.make_mesh` returns, trains what automatic axes train."""

import pytest
from eight_devices import run_on_eight_devices

PROGRAM = """
import sys, jax, jax.numpy as jnp, numpy as np, optax, dpoptax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from dpoptax.training import DeviceData, HostData, PrivateRun, fit, init_state, make_train_step

mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
everywhere, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
take = dpoptax.samplers.sharded_take(spread)
x = np.random.default_rng(0).normal(size=(512, 16)).astype(np.float32)
start = {"a": np.full((16, 32), 0.1, np.float32), "b": np.full((32,), 0.1, np.float32)}
# All rows and no noise: a mesh around a run is part of its program, so batches and noise differ.
plan = dpoptax.Plan(
    sampler=dpoptax.samplers.Poisson(512, 512, max_batch_size=512),
    clip=1.0, noise_multiplier=0.0, num_steps=3, delta=1e-4)

def loss_fn(params, row):
    return jnp.vdot(jnp.tanh(row @ params["a"]), params["b"]) ** 2

def train(params, data, **options):
    return fit(loss_fn, params, data, plan=plan, optimizer=optax.sgd(0.5),
               key=jax.random.key(0), progress=False, **options).params

def loop(params, data):
    keys = dpoptax.random.split_by_purpose(jax.random.key(0))
    run = {"tx": optax.chain(plan.privatize(keys.noise_key), optax.sgd(0.5)),
           "sampler": plan.sampler}
    state = init_state(params, sampling_key=keys[0], model_key=keys[2], **run)
    step = jax.jit(make_train_step(loss_fn, take=take, diagnostics=1.0, **run))
    for _ in range(plan.num_steps):
        state, info = step(state, data)
    assert 0 <= float(info.nonprivate_clip_fraction) <= 1
    return state.params

def own_loop(params, data):
    keys = dpoptax.random.split_by_purpose(jax.random.key(0))
    tx = optax.chain(plan.privatize(keys.noise_key), optax.sgd(0.5))

    @jax.jit
    def step(params, state, sampler_state, data):
        sampler_state, batch = plan.sampler.sample(sampler_state)
        examples = take(data, batch)
        assert jax.typeof(jax.tree.leaves(examples)[0]).sharding.spec[0] == "data"
        grads = dpoptax.per_example_grads(loss_fn)(params, examples, mask=batch.mask)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, sampler_state

    carry = params, tx.init(params), plan.sampler.init(keys.sampling_key)
    for _ in range(plan.num_steps):
        carry = step(*carry, data)
    return carry[0]

def opened(params, loss=loss_fn, **options):
    return PrivateRun(loss, params, DeviceData(spread_x, take), plan=plan,
                      optimizer=optax.sgd(0.5), key=jax.random.key(0), **options)

def run_by_steps(params, folder):
    with opened(params, resume=folder) as run:
        run.step(2)
    with opened(params, resume=folder) as run:
        assert 0 < float(run.step().nonprivate_loss)
        return run.params

def run_by_hand(params):
    run = opened(params, None)
    grads_fn = jax.jit(dpoptax.per_example_grads(loss_fn))
    while run.steps_left:
        examples = run.sample()
        assert jax.typeof(examples.examples).sharding.spec[0] == "data"
        run.apply(grads_fn(run.params, examples))
    return run.params

one = train(start, x)
same = jax.device_put(start, everywhere)
spread_x, whole_x = jax.device_put(x, spread), jax.device_put(x, everywhere)
columns = jax.device_put(start, {"a": NamedSharding(mesh, P(None, "data")), "b": spread})

def check(name, params, before=same):
    for a, b, c in zip(*map(jax.tree.leaves, (one, params, before))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
        # The result is on the mesh of the caller, with its axes and its sharding.
        assert b.sharding.mesh.axis_types == (AxisType.Explicit,), name
        assert b.sharding.is_equivalent_to(c.sharding, c.ndim), (name, b.sharding)

check("whole data", train(same, DeviceData(whole_x, take)))
check("sharded data", train(same, DeviceData(spread_x, take)))
check("plain take", train(same, spread_x))
check("host", train(same, HostData(x, take=take)))
check("microbatches", train(same, DeviceData(spread_x, take), microbatch_size=64))
check("sharded parameters", train(columns, DeviceData(whole_x, take)), columns)
check("train step", loop(same, spread_x))
check("own loop", own_loop(same, spread_x))
check("run by steps", run_by_steps(columns, sys.argv[1]), columns)
check("run by hand", run_by_hand(columns), columns)
with jax.set_mesh(mesh):
    check("fit in the context of the mesh", train(same, DeviceData(spread_x, take)))
    check("own loop in the context of the mesh", own_loop(same, spread_x))
try:
    take(spread_x, dpoptax.samplers.Batch(jnp.zeros(12, jnp.int32), jnp.ones(12, bool)))
except ValueError as error:
    assert "a batch must divide evenly over 8 devices; got 12 rows" in str(error)
else:
    raise AssertionError("a batch that does not divide was taken")

# A batch of 3 rows over the first axis of a 2 x 4 mesh: its other axis holds copies.
grid = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
try:
    dpoptax.samplers.sharded_take(NamedSharding(grid, P("data")))(
        x, dpoptax.samplers.Batch(jnp.zeros(3, jnp.int32), jnp.ones(3, bool)))
except ValueError as error:
    assert "evenly over 2 devices; got 3 rows" in str(error) and "of 4, say" in str(error)
else:
    raise AssertionError("a batch that does not divide was taken")

# A model of its own layout: a constraint and `shard_map` work, `out_sharding` is refused.
split = jax.device_put(start, {"a": NamedSharding(grid, P(None, "model")),
                               "b": NamedSharding(grid, P("model"))})
rows = jax.device_put(x[:16], NamedSharding(grid, P("data")))

def mapped(params, row):
    def of_shard(a, b):
        return jax.lax.psum(jnp.vdot(jnp.tanh(row @ a), b), "model")
    return jax.shard_map(of_shard, in_specs=(P(None, "model"), P("model")), out_specs=P(),
                         axis_names={"model"})(params["a"], params["b"]) ** 2

def constrained(params, row):
    hidden = jax.lax.with_sharding_constraint(row @ params["a"], P("model"))
    return jnp.vdot(jnp.tanh(hidden), params["b"]) ** 2

def explicit(params, row):
    hidden = jnp.einsum("k,kn->n", row, params["a"], out_sharding=P("model"))
    return jnp.einsum("n,n->", jnp.tanh(hidden), params["b"], out_sharding=P()) ** 2

def released(loss, params, rows):
    tx = dpoptax.privatize(1.0, 0.0, expected_batch_size=16, key=jax.random.key(0))

    @jax.jit
    def step(params, rows):
        grads = dpoptax.per_example_grads(loss)(params, rows)
        return tx.update(grads, tx.init(params), params)[0]

    return step(params, rows)

want = released(loss_fn, start, x[:16])
with jax.set_mesh(grid):
    for loss in (mapped, constrained):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
                     released(loss, split, rows), want)
    try:
        released(explicit, split, rows)
    except ValueError as error:
        assert "with_sharding_constraint in place of out_sharding" in str(error)
    else:
        raise AssertionError("a loss with explicit axes ran with automatic ones")
print("explicit as automatic")
"""


@pytest.mark.e2e
def test_explicit_axes_train_what_automatic_ones_train(tmp_path):
    printed = run_on_eight_devices(
        PROGRAM, str(tmp_path / "run"), JAX_NUMPY_DTYPE_PROMOTION="strict"
    )
    assert "explicit as automatic" in printed
