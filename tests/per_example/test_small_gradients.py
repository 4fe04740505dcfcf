"""Adapters inside scanned or checkpointed layers are stacked, other parameters are not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax.per_example._stacked import StackedGrads

BATCH, TOKENS, WIDTH, RANK, LAYERS = 4, 64, 16, 2, 3
BASE = 0.3 * np.random.default_rng(0).normal(size=(LAYERS, WIDTH, WIDTH)).astype(np.float32)
ROWS = np.random.default_rng(1).normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32)


def new_adapters(rank=RANK):
    random = np.random.default_rng(2)
    shapes = {"low": (LAYERS, WIDTH, rank), "high": (LAYERS, rank, WIDTH)}
    return {
        name: jnp.asarray(random.normal(size=shape), jnp.float32) / 4
        for name, shape in shapes.items()
    }


def adapted_loss(wrap, adapters, x):
    """Scanned layers with a frozen weight and an adapter."""

    def layer(x, weights):
        base, low, high = weights
        return x + jnp.tanh(x @ base + x @ low @ high), None

    x, _ = jax.lax.scan(wrap(layer), x, (BASE, adapters["low"], adapters["high"]))
    return jnp.mean(x**2)


WRAPS = {"scanned": lambda layer: layer, "checkpointed": jax.checkpoint}


def forms(loss_fn, params, rows=ROWS):
    return {row.form for row in dpoptax.explain(loss_fn, params, rows)}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_adapters_are_stacked_with_the_gradients_of_the_other_forms(wrap):
    loss_fn, adapters = functools.partial(adapted_loss, wrap), new_adapters()
    assert forms(loss_fn, adapters) == {"stacked"}
    mask = jnp.array([True, True, False, True])
    rows = jnp.asarray(ROWS).at[2].set(jnp.nan)

    @functools.partial(jax.jit, static_argnums=0)
    def read(form, adapters, rows):
        grads = dpoptax.per_example_grads(loss_fn, form=form)(adapters, rows, mask=mask)
        assert isinstance(grads, StackedGrads) == (form == "auto")
        return grads.squared_norms(), grads.weighted_sum(jnp.array([0.5, 2.0, 1.0, 0.1]))

    expected = read("factored", adapters, rows)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6),
        read("auto", adapters, rows),
        expected,
    )


def test_a_step_costs_no_more_multiplications_than_a_plain_one():
    loss_fn, adapters = functools.partial(adapted_loss, jax.checkpoint), new_adapters()

    def plain(adapters, rows):
        return jax.grad(lambda params: jnp.mean(jax.vmap(loss_fn, (None, 0))(params, rows)))(
            adapters
        )

    def private(form, adapters, rows):
        grads = dpoptax.per_example_grads(loss_fn, form=form)(adapters, rows)
        return grads.clip_and_sum(dpoptax.clipping.FlatClip(1.0).weights)

    def flops(function):
        return jax.jit(function).lower(adapters, ROWS).compile().cost_analysis()["flops"]

    base = flops(plain)
    assert flops(functools.partial(private, "auto")) < 1.1 * base
    assert flops(functools.partial(private, "recomputed")) > 1.2 * base


def test_whole_weights_and_weights_shared_over_time_are_not_stacked():
    checkpointed = functools.partial(adapted_loss, jax.checkpoint)
    assert forms(checkpointed, new_adapters(rank=WIDTH)) == {"recomputed"}

    def shared_loss(adapters, x):
        layer = jax.checkpoint(lambda x, base: (x + x @ base + x @ adapters["low"][0] @ high, None))
        high = adapters["high"][0]
        return jnp.mean(jax.lax.scan(layer, x, BASE)[0])

    assert "stacked" not in forms(shared_loss, new_adapters())

    def unscanned_loss(adapters, x):
        return jnp.sum((x @ adapters["low"][0] @ adapters["high"][0]) ** 2)

    assert "stacked" not in forms(unscanned_loss, new_adapters())
