"""Per-example gradients over model families: what `vmap(grad)` of a plain function gives."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dpoptax


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.LayerNorm()(nn.relu(nn.Dense(8)(x))))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.relu(self.first(x))))


X = jax.random.normal(jax.random.key(1), (6, 4))
Y = jnp.array([0, 1, 0, 1, 1, 0])


def cross_entropy(logits, label):
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def linen():
    model = Linen()
    params = model.init(jax.random.key(0), X[0])["params"]
    return lambda p, e: cross_entropy(model.apply({"params": p}, e[0]), e[1]), params


def nnx_model():
    model = Nnx(nnx.Rngs(0))
    model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params, example):
        return cross_entropy(nnx.merge(graphdef, params, rest)(example[0]), example[1])

    return loss_fn, params


def plain():
    params = [jnp.ones((4, 2)), jnp.zeros(2)]
    return lambda p, e: cross_entropy(e[0] @ p[0] + p[1], e[1]), params


@pytest.mark.slow
@pytest.mark.parametrize("make", [linen, nnx_model, plain])
def test_every_model_family_trains_and_keeps_its_structure(make):
    loss_fn, params = make()
    losses, grads = dpoptax.value_and_per_example_grads(loss_fn)(params, (X, Y))
    expected = jax.vmap(jax.grad(loss_fn), (None, 0))(params, (X, Y))
    assert losses.shape == (6,)
    assert jax.tree.structure(grads.stacked()) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        grads.stacked(),
        expected,
    )
    tx = optax.chain(
        dpoptax.privatize(1.0, 1.0, expected_batch_size=6, key=jax.random.key(0)), optax.sgd(0.1)
    )
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert jax.tree.structure(optax.apply_updates(params, updates)) == jax.tree.structure(params)


def test_a_key_becomes_one_key_per_example():
    def noisy(params, example, key):
        return jnp.vdot(params, example) * jax.random.normal(key)

    grads = dpoptax.per_example_grads(noisy)(
        jnp.ones(4), jnp.ones((6, 4)), key=jax.random.key(0)
    ).stacked()
    assert len(np.unique(grads[:, 0])) == 6


def test_no_example_is_a_batch_and_no_parameter_is_a_tree():
    grads = dpoptax.per_example_grads(lambda p, e: jnp.vdot(p, e))(jnp.ones(4), jnp.ones((0, 4)))
    assert grads.squared_norms().shape == (0,)
    np.testing.assert_array_equal(grads.weighted_sum(jnp.ones(0)), np.zeros(4))
    empty = dpoptax.per_example_grads(lambda p, e: jnp.sum(e))({}, jnp.ones((3, 4)))
    tx = dpoptax.privatize(1.0, 1.0, expected_batch_size=3, key=jax.random.key(0))
    assert tx.update(empty, tx.init({}), {})[0] == {}


def test_it_crosses_jit_scan_and_vmap_boundaries():
    grads_fn = dpoptax.per_example_grads(lambda p, e: jnp.vdot(p, e))
    grads = jax.jit(grads_fn)(jnp.ones(4), X)
    assert isinstance(grads, dpoptax.PerExampleGrads)
    norms = jax.jit(lambda g: g.squared_norms())(grads)
    np.testing.assert_allclose(norms, jnp.sum(X**2, 1), rtol=1e-6)
    _, stacked = jax.lax.scan(lambda c, _: (c, grads_fn(jnp.ones(4), X)), 0, None, length=2)
    np.testing.assert_array_equal(stacked.mask, np.ones((2, 6), bool))


def test_a_zero_weight_selects_its_example_out():
    grads = dpoptax.per_example_grads(lambda p, e: jnp.vdot(p, e))(
        jnp.ones(4), X.at[2].set(jnp.nan)
    )
    weights = jnp.ones(6).at[2].set(0.0)
    np.testing.assert_allclose(grads.weighted_sum(weights), X.sum(0) - X[2], rtol=1e-5, atol=1e-6)
