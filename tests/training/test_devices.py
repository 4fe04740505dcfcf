"""Eight devices, or two processes, train the same model as one, with the same report."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eight_devices import run_on_eight_devices

import dpoptax

ROOT = pathlib.Path(__file__).parents[2]
STRICT_ON_CPU = {"JAX_PLATFORMS": "cpu", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}

COMMON = """
import sys, jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import dpoptax
from dpoptax.training import DeviceData, time_limit

x = np.random.default_rng(0).normal(size=(512, 16)).astype(np.float32)
start = {"a": np.full((16, 32), 0.1, np.float32), "b": np.full((32,), 0.1, np.float32)}
plan = dpoptax.Plan(
    sampler=dpoptax.samplers.Poisson(512, 64, max_batch_size=128),
    clip=1.0, noise_multiplier=1.0, num_steps=6, delta=1e-4)

def loss_fn(params, row):
    return jnp.vdot(jnp.tanh(row @ params["a"]), params["b"]) ** 2

def train(params, data, loss_fn=loss_fn, **options):
    return dpoptax.training.fit(loss_fn, params, data, plan=plan, optimizer=optax.sgd(0.5),
                                key=jax.random.key(0), progress=False, **options)
"""
ON_EIGHT = (
    COMMON
    + """
import pathlib
assert jax.device_count() == 8
mesh = Mesh(np.array(jax.devices()), ("data",))
everywhere, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
columns = {"a": NamedSharding(mesh, P(None, "data")), "b": spread}
over = dpoptax.samplers.sharded_take(spread)
one = train(start, x)
for name, params, data in (
    ("data parallel", jax.device_put(start, everywhere), jax.device_put(x, everywhere)),
    ("sharded data", jax.device_put(start, everywhere), jax.device_put(x, spread)),
    ("sharded parameters", jax.device_put(start, columns), jax.device_put(x, everywhere)),
):
    many = train(params, DeviceData(data, over))
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(many.params)):
        assert b.sharding.is_equivalent_to(a.sharding, a.ndim), (name, b.sharding)
    assert many.epsilon() == one.epsilon()

# The views of an example have the same keys, wherever it is.
views = dpoptax.average_views(loss_fn, lambda key, x: x + jax.random.normal(key, x.shape), 2)
one, many = (train(params, data, views) for params, data in (
    (start, x), (jax.device_put(start, everywhere), DeviceData(jax.device_put(x, spread), over))))
for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

# Drawing noise needs no more memory than a few times one device's part.
size = 1 << 20
for key in (jax.random.key(0), dpoptax.random.insecure_key(0)):
    noise = jax.jit(lambda k, t: dpoptax.mechanisms._gaussian_noise.add_gaussian(k, t, 1.0),
                    in_shardings=(None, spread), out_shardings=spread)
    compiled = noise.lower(key, jax.ShapeDtypeStruct((size,), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * size // 2

try:
    small = jax.device_put(x, everywhere)[:128]
    dpoptax.samplers.sharded_take(spread)(
        small, dpoptax.samplers.Batch(jnp.zeros(12, jnp.int32), jnp.ones(12, bool)))
except ValueError as error:
    assert "a batch must divide evenly over 8 devices; got 12 rows" in str(error)
else:
    raise AssertionError("a batch that does not divide was taken")

# A run that began on one device continues on eight.
folder = pathlib.Path(sys.argv[1])
with time_limit(0.0):
    train(start, x, resume=folder)
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    spread_x = DeviceData(jax.device_put(x, everywhere), over)
    many = train(jax.device_put(start, everywhere), spread_x, resume=folder)
assert any("other noise" in str(w.message) for w in seen)
assert many.num_steps == 6
print("eight as one")
"""
)
OF_TWO = (
    """
import sys, jax, dpoptax  # importing the library must not initialize JAX
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
"""
    + COMMON
    + """
assert jax.process_count() == 2
mesh = Mesh(np.array(jax.devices()), ("data",))

def put(value, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

params = {name: put(value, P()) for name, value in start.items()}
over = dpoptax.samplers.sharded_take(NamedSharding(mesh, P("data")))
result = train(params, DeviceData(put(x, P("data")), over), resume=sys.argv[3])
again = train(params, DeviceData(put(x, P("data")), over), resume=sys.argv[3])
assert again.num_steps == result.num_steps == 6
keys = jax.random.key_data(dpoptax.random.secure_key()).tolist()
print("keys", keys)
for name in start:
    print(name, np.asarray(result.params[name]).ravel().tolist())
"""
)


def python(code, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | STRICT_ON_CPU | environment,
    )  # fmt: skip


@pytest.mark.e2e
def test_eight_devices_train_what_one_trains(tmp_path):
    out = run_on_eight_devices(ON_EIGHT, str(tmp_path / "run"), JAX_NUMPY_DTYPE_PROMOTION="strict")
    assert "eight as one" in out


@pytest.mark.e2e
def test_two_processes_train_what_one_trains(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [python(OF_TWO, address, number, tmp_path / "run") for number in range(2)]
    outs = [process.communicate(timeout=400) for process in processes]
    assert all(process.returncode == 0 for process in processes), outs[0][1] + outs[1][1]
    found = [re.search(r"keys .*", out)[0] for out, _ in outs]
    assert found[0] == found[1]
    scope = {}
    exec(COMMON, scope)  # the same in this process
    with jax.numpy_dtype_promotion("strict"):
        one = scope["train"](scope["start"], scope["x"])
    for out, _ in outs:
        for name, leaf in one.params.items():
            numbers = eval(re.search(rf"^{name} (.*)$", out, re.MULTILINE)[1])
            np.testing.assert_allclose(numbers, np.asarray(leaf).ravel(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_accumulated_microbatches_are_noised_once():
    """The whole batch, and parts of it, release the same: noise is not drawn per part."""
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(64, 32), clip=1.0, noise_multiplier=1.0, num_steps=4,
        delta=1e-3,
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(1), (64, 3))

    def train(size):
        return dpoptax.training.fit(
            lambda w, row: jnp.sum((w - row) ** 2), jnp.zeros(3), x, plan=plan,
            optimizer=optax.sgd(0.3), key=jax.random.key(0), progress=False, microbatch_size=size,
        ).params  # fmt: skip

    for size in (1, 8):
        np.testing.assert_allclose(train(None), train(size), rtol=1e-5, atol=1e-6)


def test_a_wrong_microbatch_size_is_refused():
    with pytest.raises(ValueError, match="microbatch_size"):
        dpoptax.training.make_train_step(
            lambda w, row: jnp.sum((w - row) ** 2), tx=optax.sgd(0.1),
            sampler=dpoptax.samplers.Poisson(64, 32), microbatch_size=0,
        )  # fmt: skip
