"""Frozen weights in 8 bits under adapters, and products that say the type of their result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax

BATCH, TOKENS, WIDTH, RANK = 4, 5, 6, 2
FLOAT8 = jnp.float8_e4m3fn
rng = np.random.default_rng(0)
WHOLE = jnp.asarray(rng.integers(-127, 128, (WIDTH, WIDTH)), jnp.int8)
SCALE = jnp.asarray(rng.uniform(0.001, 0.01, (1, WIDTH)), jnp.float32)
EIGHT = jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), FLOAT8)
X = np.float32(rng.normal(size=(BATCH, TOKENS, WIDTH)))


def multiply(x, w, dtype):
    numbers = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, w, numbers, preferred_element_type=dtype)


def adapted(w, x):
    """Base weights in int8 and float8, as they are and times whole activations."""
    whole = jnp.clip(jnp.round(32 * x), -127, 127).astype(jnp.int8)
    base = (x @ WHOLE.astype(x.dtype)) * SCALE
    base += multiply(x.astype(FLOAT8), EIGHT, jnp.float32)
    base += multiply(whole, WHOLE, jnp.int32).astype(jnp.float32) * (SCALE / 32)
    x = jnp.tanh(base + 2.0 * (x @ w["a"] @ w["b"]))
    return jnp.sum(jnp.square(multiply(x, w["head"], jnp.float32)))


def params():
    shapes = {"a": (WIDTH, RANK), "b": (RANK, WIDTH), "head": (WIDTH, 3)}
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("form", ["factored", "recomputed"])
def test_adapters_have_the_gradients_of_vmap_grad(form):
    w = params()

    @jax.jit
    def run(w, x):
        grads = dpoptax.per_example_grads(adapted, form=form)(w, x)
        exact = jax.vmap(jax.grad(adapted), (None, 0))(w, x)
        return exact, grads.squared_norms(), grads.weighted_sum(jnp.arange(1.0, BATCH + 1))

    exact, norms, sums = run(w, X)
    for name, leaf in exact.items():
        flat = np.asarray(leaf, np.float64).reshape(BATCH, -1)
        squares = np.sum(flat**2, axis=1)
        assert np.all(norms[name] >= squares * (1 - 1e-5))
        np.testing.assert_allclose(norms[name], squares, rtol=1e-4, err_msg=name)
        expected = np.arange(1.0, BATCH + 1) @ flat
        np.testing.assert_allclose(np.ravel(sums[name]), expected, rtol=1e-4, atol=1e-4)


def test_narrow_base_weights_do_not_stop_adapters_from_being_factored():
    rows = dpoptax.explain(adapted, params(), X)
    assert "stacked" not in {row.form for row in rows}
    assert not any(row.rule.startswith("used by") for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["factored", "recomputed"])
def test_weights_cast_to_8_bits_are_summed_in_float32(form):
    """The gradient is not rounded to 8 bits, as `vmap(grad)` rounds it."""

    def loss(w, x):
        return jnp.sum(jnp.sin(multiply(x.astype(FLOAT8), w.astype(FLOAT8), jnp.float32)))

    w = jnp.asarray(rng.normal(size=(WIDTH, 3)), jnp.float32)
    grads = dpoptax.per_example_grads(loss, form=form)(w, X)
    x = np.asarray(jnp.asarray(X).astype(FLOAT8).astype(jnp.float32), np.float64)
    narrow = np.asarray(w.astype(FLOAT8).astype(jnp.float32), np.float64)
    exact = np.einsum("btk,btn->bkn", x, np.cos(x @ narrow))
    found = np.asarray(grads.weighted_sum(jnp.ones(BATCH)), np.float64)
    assert np.linalg.norm(found - exact.sum(0)) <= 1e-5 * np.linalg.norm(exact.sum(0))
    assert np.all(grads.squared_norms() >= np.sum(exact**2, axis=(1, 2)) * (1 - 1e-5))
