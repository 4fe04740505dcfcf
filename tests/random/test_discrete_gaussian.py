"""The discrete Gaussian has its exact probabilities, at every position in a lane."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dpoptax.random import insecure_key
from dpoptax.random._discrete_gaussian import SAMPLES_PER_LANE, discrete_gaussian

N = 200_000


def distribution(bits):
    """Integers up to 12 standard deviations, and their probabilities in float64."""
    numbers = np.arange(-12 * 2**bits, 12 * 2**bits + 1)
    weights = np.exp(-(numbers.astype(float) ** 2) / (2 * 4**bits))
    return numbers, weights / weights.sum()


def goodness_of_fit(draws, bits):
    """The p-value of a chi-squared test, with rare numbers pooled."""
    numbers, probabilities = distribution(bits)
    assert np.abs(draws).max() <= numbers[-1]
    counts = np.bincount(draws - numbers[0], minlength=len(numbers))
    common = probabilities * draws.size > 8
    observed = [*counts[common], counts[~common].sum()]
    expected = [*probabilities[common], probabilities[~common].sum()]
    return scipy.stats.chisquare(observed, np.array(expected) * draws.size).pvalue


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("make", [jax.random.key, insecure_key], ids=["threefry", "chacha20"])
def test_draws_have_the_exact_probabilities(bits, make):
    draws = np.asarray(discrete_gaussian(make(bits), (N,), bits=bits))
    assert goodness_of_fit(draws, bits) > 1e-4


def test_the_test_has_power():
    """It rejects a rounded normal, and a standard deviation that is 2 % too large."""
    rounded = np.rint(np.random.default_rng(0).normal(size=N) * 2).astype(int)
    assert goodness_of_fit(rounded, 1) < 1e-6
    wider = np.rint(np.random.default_rng(1).normal(size=N) * 16.3).astype(int)
    assert goodness_of_fit(wider, 4) < 1e-6


def test_the_distribution_is_the_same_at_the_start_and_the_end_of_a_lane():
    """Collecting whatever is ready first would make early samples too small."""
    draws = np.asarray(discrete_gaussian(jax.random.key(3), (SAMPLES_PER_LANE, 10_000), bits=2))
    for row in (0, SAMPLES_PER_LANE // 2, -1):
        assert goodness_of_fit(draws[row], 2) > 1e-4


@pytest.mark.parametrize("bits", [10, 16, 24])
def test_wide_draws_are_normal_and_use_every_last_bit(bits):
    draws = np.asarray(discrete_gaussian(jax.random.key(bits), (N,), bits=bits), np.int64)
    assert scipy.stats.kstest(draws / 2**bits, "norm").pvalue > 1e-4
    parity = (draws & 1).mean()
    assert abs(parity - 0.5) < 4.5 * 0.5 / np.sqrt(N)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4.5 / np.sqrt(N)
    for bound in (2, 3, 4):
        expected = 2 * scipy.stats.norm.sf(bound) * N
        assert abs(np.sum(np.abs(draws) > bound * 2**bits) - expected) < 5 * np.sqrt(expected) + 1


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (1,), (3, 0), (7, 11), (SAMPLES_PER_LANE * 5 + 1,)])
def test_draws_of_any_shape_are_the_same_under_jit_and_vmap(shape):
    def draw(key):
        return discrete_gaussian(key, shape, bits=8)

    keys = jax.random.split(jax.random.key(0), 3)
    alone = jnp.stack([draw(key) for key in keys])
    assert alone.shape == (3, *shape)
    assert alone.dtype == jnp.int32
    np.testing.assert_array_equal(jax.jit(jax.vmap(draw))(keys), alone)


def test_bad_requests_are_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="bits must be at most 24; got 25"):
        discrete_gaussian(key, (1,), bits=25)
    with pytest.raises(ValueError, match="bits must be at least 1; got 0"):
        discrete_gaussian(key, (1,), bits=0)
    with pytest.raises(TypeError, match="typed PRNG key"):
        discrete_gaussian(jnp.zeros(2, jnp.uint32), (1,), bits=4)
