"""Windows of concatenated parameters, against NumPy indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax.per_example._tracing.concatenated import (
    cut,
    cut_spec,
    move_window,
    windows_after_concatenation,
)

WINDOW = ((0, 2), (1, 3))
VALUE = jnp.arange(10.0).reshape(2, 5)


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.T,
        lambda x: x.astype(jnp.bfloat16),
        lambda x: x.reshape(1, 2, 1, 5),
        lambda x: jax.lax.broadcast_in_dim(x, (3, 2, 5), (1, 2)),
    ],
    ids=["transpose", "convert", "reshape", "broadcast"],
)
def test_a_window_follows_a_move(move):
    """The moved window, cut from the moved array, is the equation on the window alone."""
    (eqn,) = jax.make_jaxpr(move)(VALUE).eqns
    params, window = move_window(eqn, WINDOW)
    alone = eqn.primitive.bind(cut(VALUE, WINDOW), **params)
    np.testing.assert_array_equal(cut(move(VALUE), window), alone)
    assert cut_spec(move(VALUE), window).shape == alone.shape


@pytest.mark.parametrize(
    "move", [lambda x: x.reshape(10), lambda x: x[:, :2]], ids=["reshape", "slice"]
)
def test_a_window_that_a_move_takes_apart_is_unknown(move):
    (eqn,) = jax.make_jaxpr(move)(VALUE).eqns
    assert move_window(eqn, WINDOW) is None


def test_each_input_of_a_concatenation_has_its_window():
    parts = [VALUE, 2 * VALUE[:, :1], 3 * VALUE]
    windows = windows_after_concatenation([part.shape for part in parts], 1)
    whole = jnp.concatenate(parts, 1)
    for part, window in zip(parts, windows, strict=True):
        np.testing.assert_array_equal(cut(whole, window), part)


def test_a_use_with_unknown_windows_is_stacked_and_says_so():
    def loss_fn(w, i):
        return jnp.sum(jnp.tanh(jnp.concatenate([w["a"], w["b"]])[i]))

    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 2))}
    for row in dpoptax.explain(loss_fn, params, jnp.zeros((2, 4), int)):
        assert (row.form, row.rule) == ("stacked", "concatenated and used by gather")
