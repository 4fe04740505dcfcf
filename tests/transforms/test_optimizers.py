"""The optimizers train in `fit`, in `PrivateRun` and in a scan, and continue bit for bit.

Law 1 in `tests/laws/test_laws.py` runs over all of them; here they are one inside the other.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry

import dpoptax
from dpoptax import transforms
from dpoptax.training import PrivateRun, fit, init_state, make_train_step

PLAN = dpoptax.Plan(
    sampler=dpoptax.samplers.Poisson(30, 6), clip=1.0, noise_multiplier=1.0, num_steps=4, delta=1e-3
)
DATA = jnp.linspace(-1.0, 3.0, 60, dtype=jnp.bfloat16).reshape(30, 2)
START = {"mean": jnp.zeros(2, jnp.bfloat16)}


def everything(rate):
    return transforms.scale_then_privatize(
        transforms.disk(
            optax.chain(transforms.low_pass(), optax.sgd(rate), transforms.average_params())
        )
    )


OPTIMIZERS = {"everything": everything, "adam_bc": registry.OPTIMIZERS["adam_bc"][0]}


def loss(params, x):
    return 0.5 * jnp.sum((params["mean"] - x).astype(jnp.float32) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_run_in_parts_is_that_of_fit(make, tmp_path):
    """With bfloat16 parameters, whose state holds arrays of several dtypes."""
    options = {"plan": PLAN, "optimizer": make(0.1), "key": jax.random.key(0)}
    whole = fit(loss, START, DATA, progress=False, **options)
    for _ in range(2):
        with PrivateRun(loss, START, DATA, resume=tmp_path, **options) as run:
            run.step(2)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(_plain(a), _plain(b)), whole.state, run.state
    )
    assert whole.params["mean"].dtype == jnp.bfloat16
    assert float(jnp.abs(whole.params["mean"]).sum()) > 0


@pytest.mark.seconds
def test_a_scan_of_steps_is_a_loop_of_them():
    keys = dpoptax.random.split_by_purpose(jax.random.key(1))
    tx = transforms.chain(PLAN.privatize(keys.noise_key), everything(0.1))
    step = make_train_step(loss, tx=tx, sampler=PLAN.sampler)
    state = init_state(
        {"mean": jnp.zeros(2)}, tx=tx, sampler=PLAN.sampler, sampling_key=keys.sampling_key,
        model_key=keys.model_key,
    )  # fmt: skip
    data, one = DATA.astype(jnp.float32), jax.jit(lambda state, data: step(state, data)[0])
    scanned, _ = jax.lax.scan(lambda state, _: (one(state, data), None), state, length=3)
    for _ in range(3):
        state = one(state, data)
    np.testing.assert_allclose(scanned.params["mean"], state.params["mean"], rtol=1e-6)


def _plain(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return np.asarray(leaf.astype(jnp.float32))
