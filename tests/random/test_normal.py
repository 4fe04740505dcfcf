"""Box-Muller: two words give two independent normal draws, and extreme words finite ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dpoptax.random import insecure_key
from dpoptax.random._box_muller import from_words, polar
from dpoptax.random._normal import normal
from dpoptax.random._threefry_unrolled import counted_words, unrolled

WORDS = (0, 1, 2**23, 2**24 + 1, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)
EXTREMES = np.array(WORDS, np.uint32)


def formula(radius, angle, dtype=np.float64):
    """Computes the point of two words in float64, after rounding the words to `dtype`."""
    uniform = (radius.astype(dtype) + dtype(0.5)).astype(float) / 2**32
    turn = (angle << np.uint32(1)).astype(np.int32).astype(dtype).astype(float) / 2**32
    size = np.sqrt(-2 * np.log(uniform))
    cosine = np.where(np.abs(turn) == 0.5, 0.0, np.cos(np.pi * turn))
    return size * np.where(angle < 2**31, 1, -1) * cosine + 1j * size * np.sin(np.pi * turn)


def test_the_formula_holds_for_all_kinds_of_words():
    words = np.random.default_rng(0).integers(0, 2**32, (2, 200_000), np.uint32)
    found, expected = from_words(*map(jnp.asarray, words)), formula(*words, np.float32)
    assert found.dtype == jnp.complex64
    np.testing.assert_allclose(found.real, expected.real, rtol=3e-6, atol=1e-9)
    np.testing.assert_allclose(found.imag, expected.imag, rtol=3e-6, atol=1e-9)
    size, cosine, sine = polar(*map(jnp.asarray, words))
    np.testing.assert_allclose(size * cosine, expected.real, rtol=3e-6, atol=1e-9)
    np.testing.assert_allclose(size * sine, expected.imag, rtol=3e-6, atol=1e-9)


def test_extreme_words_give_finite_draws():
    radius, angle = np.meshgrid(EXTREMES, EXTREMES)
    found = from_words(jnp.asarray(radius), jnp.asarray(angle))
    assert np.isfinite(found).all()
    # Near u = 1, float32 rounds u: the radius is off by as much as it is small.
    np.testing.assert_allclose(found, formula(radius, angle), atol=4e-4)
    size, cosine, sine = polar(jnp.asarray(radius), jnp.asarray(angle))
    for part in (found.real, found.imag, size * cosine, size * sine):
        assert np.isfinite(part).all()
        assert np.abs(part).max() == pytest.approx(6.764, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        (),
        (0, 3),
        (7,),
        (4, 3),
        *(
            pytest.param(shape, marks=pytest.mark.slow)
            for shape in ((1,), (3, 5), (5, 6, 7), (3, 1, 9, 2))
        ),
    ],
)
def test_the_two_draws_of_a_point_are_half_an_axis_apart(shape):
    draws = np.asarray(normal(jax.random.key(3), shape, jnp.float32))
    assert draws.shape == shape
    assert len(np.unique(draws)) == draws.size
    even = [axis for axis, side in enumerate(shape) if side % 2 == 0]
    if draws.size and even:
        half = list(shape)
        half[even[0]] //= 2
        points = from_words(*counted_words(jax.random.key_data(jax.random.key(3)), tuple(half)))
        expected = np.concatenate([points.real, points.imag], axis=even[0])
        np.testing.assert_allclose(draws, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "key",
    [
        jax.random.key(0),
        *(insecure_key(0, rounds=rounds) for rounds in (8, 12, 20)),
        jax.random.key(0, impl="rbg"),
    ],
    ids=str,
)
def test_millions_of_draws_are_normal_also_in_the_tails(key):
    draws = np.asarray(normal(key, (1 << 22,), jnp.float32)).astype(float)
    assert scipy.stats.kstest(draws, "norm").pvalue > 1e-3
    cuts = np.array([-5.0, -4.0, -3.0, -1.0, 0.0, 1.0, 3.0, 4.0, 5.0])
    counts = np.diff(np.concatenate([[0], np.searchsorted(np.sort(draws), cuts), [draws.size]]))
    expected = draws.size * np.diff(scipy.stats.norm.cdf([-np.inf, *cuts, np.inf]))
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3


@pytest.mark.slow
def test_neighbours_and_the_two_draws_of_a_point_are_uncorrelated_and_so_are_their_squares():
    draws = np.asarray(normal(jax.random.key(1), (1 << 20, 2), jnp.float32)).astype(float)
    early, late = np.split(draws[:, 0], 2)
    bound = 4.5 / np.sqrt(len(early))
    for power in (1, 2):
        for first, second in (draws.T, (draws[1:, 0], draws[:-1, 0]), (early, late)):
            assert abs(np.corrcoef(first**power, second**power)[0, 1]) < bound
    # All four combinations of signs are equally frequent.
    quadrants = np.bincount(2 * (early > 0) + (late > 0))
    assert scipy.stats.chisquare(quadrants).pvalue > 1e-3


@pytest.mark.slow
def test_unrolled_keys_draw_the_same_and_float64_is_drawn_as_jax_does():
    key = jax.random.key(2)
    np.testing.assert_array_equal(
        normal(key, (3, 5), jnp.float32), normal(unrolled(key), (3, 5), jnp.float32)
    )
    with jax.enable_x64(True):
        np.testing.assert_array_equal(
            normal(key, (7,), jnp.float64), jax.random.normal(key, (7,), jnp.float64)
        )
