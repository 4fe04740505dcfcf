"""Microbatches are chosen by what the compiler says of memory, from shapes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.training import _fit as loop
from dpoptax.training import choose_microbatch_size, fit


def loss_fn(params, x):
    """Its gradient by `params` is held in full for every example."""
    return jnp.sum(jnp.cumsum(params * x[0]) ** 2) / params.size


WIDE = jax.ShapeDtypeStruct((100_000,), jnp.float32)
VECTOR = jax.ShapeDtypeStruct((3,), jnp.float32)


def choose(limit, size=48):
    return choose_microbatch_size(loss_fn, WIDE, VECTOR, max_batch_size=size, memory_limit=limit)


@pytest.mark.slow
def test_less_memory_means_smaller_parts_down_to_a_refusal():
    sizes = [choose(limit) for limit in (10**9, 20 * 10**6, 5 * 10**6)]
    assert sizes[0] is None
    assert 48 > sizes[1] > sizes[2] >= 1
    assert all(size & (size - 1) == 0 for size in sizes[1:])
    with pytest.raises(ValueError, match=r"one example at a time needs .* the limit is 1,000"):
        choose(1000)


def test_a_model_of_a_hundred_million_parameters_is_planned_without_one():
    params = {"wide": jax.ShapeDtypeStruct((10_000, 10_000), jnp.float32)}
    example = jax.ShapeDtypeStruct((10_000,), jnp.float32)

    def dense(params, x):
        return jnp.sum((x @ params["wide"]) ** 2)

    # Factored, a batch needs the sum of its gradients and little more; stacked it would be 26 GB.
    assert (
        choose_microbatch_size(
            dense, params, example, max_batch_size=64, memory_limit=2 * 4 * 10**8
        )
        is None
    )


@pytest.mark.slow
def test_fit_takes_what_was_chosen(monkeypatch):
    monkeypatch.setattr("dpoptax.training._memory.default_limit", lambda: 4 * 10**5)
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(100, 20), clip=1.0, noise_multiplier=1.0, num_steps=2,
        delta=1e-3,
    )  # fmt: skip
    data = jax.random.normal(jax.random.key(0), (100, 3))

    def train(size):
        return fit(
            loss_fn, jnp.ones(10_000), data, plan=plan, optimizer=optax.sgd(0.1),
            key=jax.random.key(0), progress=False, microbatch_size=size,
        ).params  # fmt: skip

    np.testing.assert_allclose(train("auto"), train(None), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_auto_knows_what_the_mechanism_needs(monkeypatch):
    """Exact noise sums whole gradients, where the factors of a product would be enough."""
    monkeypatch.setattr("dpoptax.training._memory.default_limit", lambda: 2 * 10**7)
    chosen = []
    make = loop.make_train_step

    def noted(*args, **options):
        chosen.append(options["microbatch_size"])
        return make(*args, **options)

    monkeypatch.setattr(loop, "make_train_step", noted)
    for mechanism in (dpoptax.mechanisms.Gaussian(), dpoptax.mechanisms.DiscreteGaussian(bits=20)):
        plan = dpoptax.Plan(
            sampler=dpoptax.samplers.Poisson(100, 40), clip=1.0, noise_multiplier=1.0, num_steps=1,
            delta=1e-3, mechanism=mechanism,
        )  # fmt: skip
        fit(
            lambda w, x: jnp.sum((x @ w) ** 2), jnp.ones((300, 300)), jnp.ones((100, 300)),
            plan=plan, optimizer=optax.sgd(0.1), key=jax.random.key(0), progress=False,
            microbatch_size="auto",
        )  # fmt: skip
    assert chosen[0] is None
    assert 1 <= chosen[1] < 40
