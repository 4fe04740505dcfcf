"""Loops that people have become private by the lines that the page on moving over names."""

import pathlib
import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import dpoptax

pytestmark = pytest.mark.e2e
DATA = (jax.random.normal(jax.random.key(0), (200, 4)), jnp.zeros(200, jnp.int32))


@pytest.fixture
def drawn():
    sampler = dpoptax.samplers.Poisson(200, 50)
    _, batch = sampler.sample(sampler.init(jax.random.key(1)))
    return dpoptax.samplers.take(DATA, batch)


def private():
    """Without clip and noise the update is that of the mean gradient."""
    return dpoptax.privatize(float("inf"), 0.0, expected_batch_size=50, key=jax.random.key(2))


def cross_entropy(logits, label):
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def test_a_train_state_of_linen(drawn):
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), DATA[0][0])["params"]

    def loss_fn(params, example):
        return cross_entropy(model.apply({"params": params}, example[0]), example[1])

    tx = optax.chain(private(), optax.sgd(0.1))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        grads = dpoptax.per_example_grads(loss_fn)(state.params, drawn)
        return state.apply_gradients(grads=grads)

    def mean_loss(params):
        losses = jax.vmap(loss_fn, (None, 0))(params, drawn.examples)
        return jnp.sum(jnp.where(drawn.mask, losses, 0.0)) / 50

    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(mean_loss)(params))
    after = step(state)
    assert int(after.step) == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after.params, expected)


def test_an_optimizer_of_nnx(drawn):
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    loss_fn, params = dpoptax.nnx.loss_fn(
        model, lambda model, example: cross_entropy(model(example[0]), example[1])
    )
    transformation = private()
    state = transformation.init(params)

    def mean_loss(params):
        losses = jax.vmap(loss_fn, (None, 0))(params, drawn.examples)
        return jnp.sum(jnp.where(drawn.mask, losses, 0.0)) / 50

    before = np.asarray(model.kernel[...])
    slope = np.asarray(jax.grad(mean_loss)(params).kernel[...])
    grads = dpoptax.per_example_grads(loss_fn)(params, drawn)
    noisy, state = transformation.update(grads, state, params)
    optimizer.update(model, noisy)
    np.testing.assert_allclose(model.kernel[...], before - 0.1 * slope, rtol=1e-5, atol=1e-6)


def test_a_run_of_linen_nnx_and_equinox_makes_the_steps_of_the_loop():
    """Without clip and noise, a step over all examples is that of the mean gradient."""
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.FixedSize(200, 200), clip=float("inf"), noise_multiplier=0.0,
        num_steps=1, delta=1e-3,
    )  # fmt: skip
    linen, model = nn.Dense(3), nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graph, split = nnx.split(model, nnx.Param)
    arrays, static = eqx.partition(eqx.nn.Linear(4, 3, key=jax.random.key(0)), eqx.is_inexact_array)
    starts = (linen.init(jax.random.key(0), DATA[0][0])["params"], arrays, split)
    applies = (
        lambda params, x: linen.apply({"params": params}, x),
        lambda params, x: eqx.combine(params, static)(x),
        lambda params, x: nnx.merge(graph, params)(x),
    )
    for params, apply in zip(starts, applies, strict=True):

        def loss_fn(params, example, apply=apply):
            return cross_entropy(apply(params, example[0]), example[1])

        def mean_loss(params, loss_fn=loss_fn):
            return jax.vmap(loss_fn, (None, 0))(params, DATA).mean()

        run = dpoptax.training.PrivateRun(
            loss_fn, params, DATA, plan=plan, optimizer=optax.sgd(0.1)
        )
        assert len(list(run)) == 1
        expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(mean_loss)(params))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), run.params, expected)
    nnx.update(model, run.params)
    np.testing.assert_array_equal(model.kernel[...], run.params.kernel[...])


def programs(heading):
    page = (pathlib.Path(__file__).parents[2] / "docs" / "adoption.md").read_text()
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


@jax.numpy_dtype_promotion("standard")  # Adam
@pytest.mark.parametrize("heading", ["Gradients of your own", "A loop from single parts"])
def test_the_programs_of_the_page_run_as_they_are(heading, capsys):
    names = {
        "dpoptax": dpoptax, "jax": jax, "optax": optax, "data": DATA[0], "params": jnp.zeros(4),
        "loss_fn": lambda params, example: jnp.sum((params - example) ** 2),
        "plan": dpoptax.Plan(
            sampler=dpoptax.samplers.Poisson(200, 50), clip=1.0, noise_multiplier=1.0, num_steps=2,
            delta=1e-3,
        ),
    }  # fmt: skip
    (program,) = programs(heading)
    exec(program, names)
    epsilon = names["plan"].epsilon()
    if "run" in names:
        assert names["run"].epsilon() == epsilon
    else:
        assert float(capsys.readouterr().out) == epsilon
