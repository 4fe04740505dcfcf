"""Normals of two words each have the law of a normal, and their extremes are finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dpoptax.random import test_key as chacha20_key
from dpoptax.random.box_muller import from_words, normal
from dpoptax.random.threefry import written_out

EXTREMES = np.array([0, 1, 2**23, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)


def formula(radius, angle, dtype=np.float64):
    """In float64, u rounded to `dtype`, and the angle kept to a half plane."""
    uniform = (radius.astype(dtype) + dtype(0.5)).astype(float) / 2**32
    turn = angle.astype(np.int32).astype(float) / 2**32
    return np.sqrt(-2 * np.log(uniform)) * np.sin(np.pi * turn)


def test_the_formula_holds_for_all_kinds_of_words():
    words = np.random.default_rng(0).integers(0, 2**32, (2, 200_000), np.uint32)
    found, expected = from_words(*map(jnp.asarray, words)), formula(*words, np.float32)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=3e-6, atol=1e-9)


def test_extreme_words_give_finite_draws():
    radius, angle = np.meshgrid(EXTREMES, EXTREMES)
    found = from_words(jnp.asarray(radius), jnp.asarray(angle))
    assert np.isfinite(found).all()
    # Near u = 1, float32 rounds u: the radius is off by as much as it is small.
    np.testing.assert_allclose(found, formula(radius, angle), atol=4e-4)
    assert np.abs(found).max() == pytest.approx(6.764, abs=1e-3)


def test_millions_of_draws_are_normal_also_in_the_tails():
    draws = np.asarray(normal(jax.random.key(0), (1 << 22,), jnp.float32)).astype(float)
    assert scipy.stats.kstest(draws, "norm").pvalue > 1e-3
    cuts = np.array([-5.0, -4.0, -3.0, -1.0, 0.0, 1.0, 3.0, 4.0, 5.0])
    counts = np.diff(np.concatenate([[0], np.searchsorted(np.sort(draws), cuts), [draws.size]]))
    expected = draws.size * np.diff(scipy.stats.norm.cdf([-np.inf, *cuts, np.inf]))
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3


def test_neighbours_and_squares_of_neighbours_are_uncorrelated():
    draws = np.asarray(normal(jax.random.key(1), (1 << 20, 2), jnp.float32)).astype(float)
    bound = 4.5 / np.sqrt(len(draws))
    for power in (1, 2):
        for first, second in ((draws[:, 0], draws[:, 1]), (draws[1:, 0], draws[:-1, 0])):
            assert abs(np.corrcoef(first**power, second**power)[0, 1]) < bound


def test_keys_written_out_or_not_draw_the_same_and_others_as_jax_does():
    key = jax.random.key(2)
    np.testing.assert_array_equal(
        normal(key, (3, 5), jnp.float32), normal(written_out(key), (3, 5), jnp.float32)
    )
    for other in (chacha20_key(0), jax.random.key(0, impl="rbg")):
        np.testing.assert_array_equal(
            normal(other, (7,), jnp.float32), jax.random.normal(other, (7,), jnp.float32)
        )
    with jax.enable_x64(True):
        np.testing.assert_array_equal(
            normal(key, (7,), jnp.float64), jax.random.normal(key, (7,), jnp.float64)
        )
