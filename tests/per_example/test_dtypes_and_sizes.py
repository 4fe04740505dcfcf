"""Losses with unusual but legal types and sizes: all forms give the gradients of `vmap(grad)`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax

BATCH = 4
rng = np.random.default_rng(0)
WHOLE = rng.integers(-5, 5, (BATCH, 7, 6))
X = rng.normal(size=(BATCH, 7, 6)).astype(np.float32)
TARGETS = rng.normal(size=(BATCH, 7, 3)).astype(np.float32)
W = rng.normal(size=(6, 3)).astype(np.float32)


def multiply(x, w):
    """A product with a float32 result, whatever the type of `x`."""
    numbers = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, w, numbers, preferred_element_type=jnp.float32)


def check(loss_fn, params, examples, held, monkeypatch):
    """Norms, sums and gradients of every form are those of `vmap(grad)`, in these types."""
    monkeypatch.setattr(dpoptax.per_example._factored, "is_materialized", lambda *_: held)
    rule = dpoptax.clipping.FlatClip(1.0)

    @jax.jit
    def run(params, examples):
        results = []
        for options in ({}, {"form": "stacked"}, {"microbatch_size": 3}):
            grads = dpoptax.per_example_grads(loss_fn, **options)(params, examples)
            clipped, norms = grads.clip_and_sum(rule.weights), grads.squared_norms()
            results.append((grads.stacked(), norms, clipped))
        return results, jax.vmap(jax.grad(loss_fn), (None, 0))(params, examples)

    results, exact = jax.tree.map(np.asarray, run(params, examples))
    squares = [np.sum(g.reshape(BATCH, -1) ** 2, axis=1) for g in jax.tree.leaves(exact)]
    weights = np.minimum(1, 1 / np.sqrt(sum(squares)))
    for stacked, norms, clipped in results:
        for got, leaf in zip(jax.tree.leaves(stacked), jax.tree.leaves(exact), strict=True):
            assert got.dtype == leaf.dtype
            np.testing.assert_allclose(got, leaf, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(jax.tree.leaves(norms), squares, rtol=1e-4, atol=1e-6)
        for got, leaf in zip(jax.tree.leaves(clipped), jax.tree.leaves(exact), strict=True):
            expected = np.tensordot(weights, leaf, 1)
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


held = pytest.mark.parametrize(
    "held", [pytest.param(True, marks=pytest.mark.slow), False], ids=["held", "factors"]
)


@pytest.mark.seconds
@pytest.mark.parametrize(("dtype", "held"), [(np.int8, False), (bool, True)])
def test_whole_numbers_times_a_float_weight(dtype, held, monkeypatch):
    def loss_fn(params, example):
        x, y = example
        over_places = jnp.sum(jnp.square(multiply(x, params["places"]) - y))
        once = jnp.sum(jnp.sin(multiply(x[0], params["once"])))
        # Both orientations of one weight.
        back = jax.lax.dot_general(params["twice"], y, (((1,), (1,)), ((), ())))
        twice = jnp.sum(multiply(x, params["twice"])) + jnp.sum(back)
        return over_places + once + twice

    params = {"places": W, "once": W + 1, "twice": W - 1}
    check(loss_fn, params, (WHOLE.astype(dtype), TARGETS), held, monkeypatch)


@pytest.mark.seconds
@held
def test_leaves_of_float32_and_float64(held, monkeypatch):
    def loss_fn(params, x):
        hidden = jnp.tanh(x @ params["a"]).astype(jnp.float64)
        output = jnp.square(hidden @ params["b"] + params["c"])
        # A float64 leaf in a float32 product, and a float32 input in a float64 one.
        narrow = jnp.sum(x[:, :3] @ params["b"].astype(jnp.float32)).astype(jnp.float64)
        numbers = (((1,), (0,)), ((), ()))
        wide = jax.lax.dot_general(x, params["a"], numbers, preferred_element_type=jnp.float64)
        return jnp.sum(output) + narrow + jnp.sum(jnp.sin(wide))

    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        params = {"a": W, "b": W[:3, :2].astype(np.float64), "c": np.ones(2)}
        check(loss_fn, jax.tree.map(jnp.asarray, params), X, held, monkeypatch)

        def update(params):
            tx = dpoptax.privatize(1.0, 1.0, expected_batch_size=4, key=jax.random.key(0))
            grads = dpoptax.per_example_grads(loss_fn)(params, jnp.asarray(X))
            return tx.update(grads, tx.init(params), params)[0]

        for shape, param in zip(
            jax.tree.leaves(jax.eval_shape(update, params)), jax.tree.leaves(params), strict=True
        ):
            assert shape.dtype == param.dtype


NUMBERS = ("NWC", "WIO", "NWC")
WITHOUT_NUMBERS = {
    "no inputs": ((0, 3), lambda w, x: x[:, :0] @ w),
    "no outputs": ((6, 0), lambda w, x: x @ w),
    "no products": ((0, 6, 3), lambda w, x: jnp.einsum("tk,hkn->htn", x, w)),
    "bias": ((0,), lambda w, x: x[:, :0] + w),
    "rows": ((0, 3), lambda w, x: w[jnp.zeros(0, int)] + x[0, 0]),
    "columns": ((5, 0), lambda w, x: w[jnp.zeros(3, int)] + x[0, 0]),
    "features": (
        (3, 6, 0),
        lambda w, x: jax.lax.conv_general_dilated(
            x[None], w, (1,), "SAME", dimension_numbers=NUMBERS
        ),
    ),
    "two uses": ((0, 6), lambda w, x: jnp.sum(x[:, :0] @ w) + jnp.sum(x @ w.T)),
    "sine": ((0,), lambda w, x: jnp.sin(w) + x[0, 0]),
}


@pytest.mark.seconds
@held
def test_leaves_without_numbers(held, monkeypatch):
    def loss_fn(params, x):
        none = sum(jnp.sum(use(params[name], x)) for name, (_, use) in WITHOUT_NUMBERS.items())
        return none + jnp.sum(jnp.square(x @ params["w"]))

    params = {name: np.zeros(shape, np.float32) for name, (shape, _) in WITHOUT_NUMBERS.items()}
    check(loss_fn, {**params, "w": W}, X, held, monkeypatch)
