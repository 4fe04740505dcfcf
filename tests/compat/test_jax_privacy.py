"""`compat.jax_privacy.clipped_grad` without JAX Privacy; `trainers/` compares it with theirs."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpoptax.compat.jax_privacy import clipped_grad
from dpoptax.samplers import MaskedExamples

X = jnp.array([[3.0, 4.0], [0.3, 0.4], [-6.0, 8.0]])
W = jnp.zeros(2)


def loss_fn(w, x):
    """The gradient of a row is the row."""
    assert x.shape == (1, 2)
    return jnp.sum(x @ w)


def sum_of(call=None, x=X, **options):
    grad_fn = clipped_grad(loss_fn, **{"l2_clip_norm": 1.0, **options})
    return jax.jit(grad_fn)(W, x, **(call or {}))


def test_clips_rescales_and_normalizes():
    clipped = np.array([0.6 + 0.3 - 0.6, 0.8 + 0.4 + 0.8])
    np.testing.assert_allclose(sum_of(), clipped, rtol=1e-5)
    np.testing.assert_allclose(sum_of(normalize_by=4.0), clipped / 4, rtol=1e-5)
    half = sum_of(l2_clip_norm=0.5, rescale_to_unit_norm=True, normalize_by=2.0)
    np.testing.assert_allclose(half, [0.6 / 2, 2.4 / 2], rtol=1e-5)


@pytest.mark.parametrize(
    ("bound", "rescale", "expected"),
    [
        (0.0, False, [0.0, 0.0]),
        (0.0, True, [0.6, 2.4]),
        (1e-13, False, [0.0, 0.0]),
        (np.inf, False, [-2.7, 12.4]),
        (np.inf, True, [0.0, 0.0]),
    ],
)
def test_extreme_bounds(bound, rescale, expected):
    found = sum_of(l2_clip_norm=bound, rescale_to_unit_norm=rescale)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_bound_may_be_traced():
    def of_bound(bound):
        return clipped_grad(loss_fn, l2_clip_norm=bound)(W, X)

    run = jax.jit(of_bound)
    np.testing.assert_allclose(run(1.0), sum_of(), rtol=1e-6)
    assert run(-1.0).tolist() == run(np.nan).tolist() == [0.0, 0.0]


def test_padding_and_non_finite_examples_contribute_nothing():
    padding = jnp.array([False, True, False])
    options = {"return_values": True, "return_grad_norms": True}
    total, aux = sum_of({"is_padding_example": padding}, **options)
    np.testing.assert_allclose(total, [0.0, 1.6], atol=1e-6)
    np.testing.assert_allclose(aux.grad_norms, [5.0, 0.5, 10.0], rtol=1e-5)
    # Also from `dpoptax.samplers.take`.
    total, _ = sum_of(x=MaskedExamples(X, ~padding), **options)
    np.testing.assert_allclose(total, [0.0, 1.6], atol=1e-6)
    broken = X.at[1, 0].set(jnp.nan)
    for call in ({}, {"is_padding_example": padding}):
        for nan_safe in (True, False):
            total = sum_of(call, x=broken, nan_safe=nan_safe)
            np.testing.assert_allclose(total, [0.0, 1.6], atol=1e-6)
    assert sum_of(x=X[:0]).tolist() == [0.0, 0.0]


@pytest.mark.seconds
def test_narrow_parameters_have_a_float32_sum():
    narrow = clipped_grad(lambda w, x: jnp.sum(x @ w), l2_clip_norm=1.0, return_grad_norms=True)
    total, aux = narrow(W.astype(jnp.float16), X.astype(jnp.float16))
    assert (total.dtype, aux.grad_norms.dtype) == (jnp.float32, jnp.float32)
    for dtype in (jnp.float16, jnp.bfloat16, jnp.int32):
        with pytest.raises(ValueError, match=r"dtype must be float32 or wider.*got.*Leave it out"):
            clipped_grad(loss_fn, l2_clip_norm=1.0, dtype=dtype)


def test_sensitivity_follows_the_relation():
    relations = dp_accounting.NeighboringRelation
    grad_fn = clipped_grad(loss_fn, l2_clip_norm=3.0, normalize_by=2.0)
    assert grad_fn.sensitivity() == grad_fn.sensitivity(relations.ADD_OR_REMOVE_ONE) == 1.5
    assert grad_fn.sensitivity(relations.REPLACE_ONE) == 3.0
    unit = clipped_grad(loss_fn, l2_clip_norm=3.0, rescale_to_unit_norm=True)
    assert (unit.l2_norm_bound, unit.has_aux) == (1.0, False)
    assert clipped_grad(loss_fn, l2_clip_norm=3.0, return_values=True).has_aux


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_argnums": 0}, "with overlap"),
        ({"batch_argnums": ()}, "Batch Argnums must not be empty"),
        ({"argnums": -1}, "must be >= 0"),
        ({"normalize_by": 0.0}, "normalize_by"),
        ({"l2_clip_norm": -1.0}, "must be non-negative"),
        ({"l2_clip_norm": np.nan}, "must be non-negative"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        clipped_grad(loss_fn, **{"l2_clip_norm": 1.0, **options})


def test_bad_calls_are_refused():
    grad_fn = clipped_grad(loss_fn, l2_clip_norm=1.0)
    with pytest.raises(ValueError, match="expected at least 2 positional arguments"):
        grad_fn(W)
    with pytest.raises(ValueError, match=r"argument train must have a leading batch axis"):
        grad_fn(W, X, train=True)
    with pytest.raises(ValueError, match=r"Batch axis must have the same size.*argument w: 2"):
        grad_fn(W, X, w=jnp.ones(2))
    with pytest.raises(TypeError, match="is_padding_example must be boolean"):
        grad_fn(W, X, is_padding_example=jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"is_padding_example must have shape \(3,\)"):
        grad_fn(W, X, is_padding_example=jnp.zeros(2, bool))
    with pytest.raises(AssertionError) as error:
        clipped_grad(loss_fn, l2_clip_norm=1.0, keep_batch_dim=False)(W, X)
    assert "dpoptax called fun with one row" in "".join(error.value.__notes__)
