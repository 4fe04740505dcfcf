"""Misuse: an optimizer that is private itself, or that is not called."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

import dpoptax


def loss(params, x):
    return jnp.sum((x @ params) ** 2)


def fit(optimizer):
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(8, 2), clip=1.0, noise_multiplier=1.0, num_steps=1,
        delta=1e-3,
    )  # fmt: skip
    inspect.unwrap(dpoptax.training.fit)(  # its own checks, not those of the tests
        loss,
        jnp.ones((2, 2)),
        jnp.ones((8, 2)),
        plan=plan,
        optimizer=optimizer,
        key=jax.random.key(0),
    )


@pytest.mark.untyped
def test_fit_takes_an_optimizer_that_is_plain_and_called():
    options = {"noise_multiplier": 1.0, "expected_batch_size": 2.0, "key": jax.random.key(0)}
    for private_one in (
        dpoptax.dp_sgd(0.1, 1.0, **options),
        optax.chain(dpoptax.privatize(1.0, **options), optax.adam(0.1)),
        optax.chain(optax.scale(1.0), dpoptax.dp_adam(0.1, 1.0, **options)),
    ):
        with pytest.raises(ValueError, match=r"got one with privatize.*Pass for example optax.sgd"):
            fit(private_one)
    for uncalled, name in ((optax.adam, "adam"), (optax.MultiSteps, "MultiSteps")):
        with pytest.raises(TypeError, match=f"got {name}, which is not called. Call it, for"):
            fit(uncalled)
    with pytest.raises(TypeError, match=r"got an object of type float.*optax.adam\(1e-3\)"):
        fit(0.1)
    with pytest.raises(TypeError, match=r"tx must be a transformation.*sgd, which is not called"):
        inspect.unwrap(dpoptax.training.make_train_step)(loss, tx=optax.sgd, sampler=None)
