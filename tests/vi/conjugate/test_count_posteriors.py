"""Posteriors of counts are exact: against all possible counts, and by simulation."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import dpoptax
from dpoptax.vi.conjugate import BetaBernoulli, DirichletMultinomial
from dpoptax.vi.conjugate._counts import draw_counts, successes_posterior

KEY = jax.random.key(0)


def all_counts_posterior(noisy, stddev, num_examples, concentration):
    """Every vector of counts, with its posterior probability."""
    vectors = np.array(
        [
            vector
            for vector in itertools.product(range(num_examples + 1), repeat=len(noisy))
            if sum(vector) == num_examples
        ]
    )
    logs = special.gammaln(vectors + concentration).sum(axis=1)
    logs -= special.gammaln(vectors + 1).sum(axis=1)
    logs -= ((vectors - noisy) ** 2).sum(axis=1) / (2 * stddev**2)
    weights = np.exp(logs - logs.max())
    return vectors, weights / weights.sum()


def test_counts_are_drawn_from_their_exact_posterior():
    noisy, concentration = np.array([7.2, -1.5, 4.1, 3.0]), np.array([0.5, 1.0, 3.0, 1.0])
    vectors, weights = all_counts_posterior(noisy, 2.0, 12, concentration)
    uniforms = np.random.default_rng(0).random((20_000, 4))
    drawn = draw_counts(noisy, 2.0, 12, concentration, uniforms)
    assert (drawn.sum(axis=1) == 12).all()
    index = {tuple(vector): place for place, vector in enumerate(vectors)}
    found = np.bincount([index[tuple(row)] for row in drawn], minlength=len(vectors))
    expected = weights * len(drawn)
    large = expected > 5
    statistic = ((found - expected)[large] ** 2 / expected[large]).sum()
    freedom = large.sum() - 1
    limit = freedom + 4 * math.sqrt(2 * freedom)
    assert statistic < limit
    # Power: without knowing that counts sum to 12, or with another noise, the test fails.
    _, other = all_counts_posterior(noisy, 2.3, 12, concentration)
    other = other * len(drawn)
    assert ((found - other)[large] ** 2 / other[large]).sum() > limit


def test_two_categories_agree_with_one_number_of_successes():
    """Half the difference of two noisy counts is a noisy number of successes."""
    first, second, stddev = 20.0, 13.5, 3.0
    successes = (first - second + 40) / 2
    weights = successes_posterior(successes, stddev / math.sqrt(2), 40, 2.0, 2.0)
    vectors, both = all_counts_posterior(np.array([first, second]), stddev, 40, 2.0)
    expected = np.zeros(41)
    expected[vectors[:, 0]] = both
    np.testing.assert_allclose(weights, expected, atol=1e-12)


def coverage(ranks):
    ranks = np.asarray(ranks)
    return np.mean((ranks > 0.05) & (ranks < 0.95))


@pytest.mark.seconds
def test_intervals_of_a_probability_cover():
    worlds, num_examples, model = 600, 60, BetaBernoulli(alpha=2.0, beta=3.0)
    keys = jax.random.split(KEY, 3)
    truth = jax.random.beta(keys[0], 2.0, 3.0, (worlds,))
    data = jax.random.uniform(keys[1], (worlds, num_examples)) < truth[:, None]
    release = jax.vmap(lambda key, row: model._noisy_sum(key, row, 12.0)[0])
    noisy = np.asarray(release(jax.random.split(keys[2], worlds), data), np.float64)
    stddev = model._noisy_sum(KEY, data[0], 12.0)[1]
    truth, counts = np.asarray(truth, np.float64), np.arange(num_examples + 1)
    cdf = special.betainc(2.0 + counts, 3.0 + num_examples - counts, truth[:, None])
    ranks = [
        cdf[world] @ successes_posterior(noisy[world], stddev, num_examples, 2.0, 3.0)
        for world in range(worlds)
    ]
    standard_error = math.sqrt(0.9 * 0.1 / worlds)
    assert abs(coverage(ranks) - 0.9) < 3 * standard_error
    # Power: the posterior of the noisy count taken for the true one.
    rounded = np.clip(np.rint(noisy), 0, num_examples)
    naive = special.betainc(2.0 + rounded, 3.0 + num_examples - rounded, truth)
    assert coverage(naive) < 0.9 - 5 * standard_error


def test_intervals_of_category_probabilities_cover():
    worlds, num_examples, draws = 300, 80, 200
    model = DirichletMultinomial(num_categories=4, concentration=0.7)
    generator = np.random.default_rng(1)
    truth = generator.dirichlet(np.full(4, 0.7), worlds)
    counts = np.stack([generator.multinomial(num_examples, p) for p in truth])
    noisy = counts + 5.0 * generator.standard_normal(counts.shape)
    ranks, naive = [], []
    for world in range(worlds):
        found = draw_counts(
            noisy[world],
            5.0,
            num_examples,
            np.full(4, model.concentration),
            generator.random((draws, 4)),
        )
        gammas = generator.standard_gamma(found + 0.7)
        ranks.append((gammas / gammas.sum(axis=1, keepdims=True) < truth[world]).mean(axis=0))
        gammas = generator.standard_gamma(np.maximum(noisy[world], 0) + 0.7, (draws, 4))
        naive.append((gammas / gammas.sum(axis=1, keepdims=True) < truth[world]).mean(axis=0))
    # The four intervals of a world are dependent: count the worlds only.
    standard_error = math.sqrt(0.9 * 0.1 / worlds)
    assert abs(coverage(ranks) - 0.9) < 3 * standard_error
    assert coverage(naive) < 0.9 - 5 * standard_error


@pytest.mark.slow
def test_posteriors_of_releases():
    ledger = dpoptax.accounting.Ledger(dpoptax.samplers.Poisson(1000, 1000), clip=1.0, delta=1e-5)
    bernoulli, categories = BetaBernoulli(), DirichletMultinomial(num_categories=3)
    data = jnp.arange(1000) % 4
    noisy = bernoulli.release(data == 0, noise_multiplier=2.0, ledger=ledger, key=KEY)
    drawn = bernoulli.posterior(noisy, 2000, key=KEY)["probability"]
    assert abs(float(drawn.mean()) - 0.25) < 0.02
    variance = 0.25 * 0.75 / 1000 + (noisy.noise_stddev / 1000) ** 2
    assert abs(float(drawn.std()) / math.sqrt(variance) - 1) < 0.1
    data = jnp.minimum(data, 2)
    noisy = categories.release(data, noise_multiplier=2.0, ledger=ledger, key=KEY)
    drawn = categories.posterior(noisy, 500, key=KEY)["probabilities"]
    np.testing.assert_allclose(drawn.mean(axis=0), [0.25, 0.25, 0.5], atol=0.02)
