"""Synthetic data, estimates from several synthetic sets, and likelihoods with missing values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import dpoptax
from dpoptax.vi import guides, local_elbo_loss, observed_log_prob, synthetic_data
from dpoptax.vi.contrib import combine_synthetic_estimates

N, SETS = 400, 20


@pytest.mark.slow
def test_intervals_from_synthetic_data_cover_the_truth():
    """A mean is inferred, synthetic data are drawn, and the mean is estimated from these.

    Rubin's intervals cover the true mean. Those of one set do not: they ignore the posterior.
    """
    guide = guides.MeanField(jnp.zeros(()))
    covered = alone = 0
    repetitions = 300
    simulated = jax.jit(
        lambda guide_params, key: synthetic_data(
            guide,
            guide_params,
            lambda mean, k: mean + jax.random.normal(k, (N,)),
            key,
            num_sets=SETS,
        )
    )
    for seed in range(repetitions):
        key, data_key = jax.random.split(jax.random.key(seed))
        # The exact posterior of a mean that is 0, after N observations of variance 1.
        loc = jax.random.normal(data_key) / np.sqrt(N)
        guide_params = {"loc": loc, "raw_scale": jnp.log(jnp.expm1(jnp.full((1,), N**-0.5)))}
        sets = np.asarray(simulated(guide_params, key), float)
        found = combine_synthetic_estimates(sets.mean(1), sets.var(1, ddof=1) / N)
        reach = scipy.stats.t.ppf(0.975, found.degrees_of_freedom) * np.sqrt(found.variance)
        covered += abs(found.estimate) <= reach
        alone += abs(sets[0].mean()) <= 1.96 * sets[0].std() / np.sqrt(N)
    # 285 of 300 are expected at 95 %, with a standard error of 3.8.
    assert covered > 0.95 * repetitions - 4.5 * np.sqrt(repetitions * 0.05 * 0.95)
    assert alone < 0.85 * repetitions


def test_combine_works_by_coordinate_and_never_gives_a_negative_variance():
    rng = np.random.default_rng(0)
    estimates = rng.normal(size=(4, 3)) * np.array([1.0, 0.01, 0.0])
    variances = np.full((4, 3), 0.1)
    found = combine_synthetic_estimates(estimates, variances)
    between = 1.25 * estimates[:, 0].var(ddof=1)
    np.testing.assert_allclose(found.variance, [between - 0.1, 0.1, 0.1])
    np.testing.assert_allclose(found.degrees_of_freedom[0], 3 * (1 - 0.1 / between) ** 2)
    for bad in (([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, 2.0], [1.0, -1.0])):
        with pytest.raises(ValueError, match=r"two sets or more|cannot be negative"):
            combine_synthetic_estimates(*bad)


@pytest.mark.slow
def test_missing_values_change_neither_loss_nor_gradients_of_the_rest():
    """A small VAE on images with missing pixels: finite, whatever the missing pixels hold."""

    def encode(params, example):
        seen = jnp.where(jnp.isnan(example), 0.0, example)
        return params["w"] @ seen, jnp.ones(2)

    def log_likelihood(params, latent, example):
        return observed_log_prob(lambda x: -0.5 * (x - latent @ params["w"]) ** 2, example)

    params = {"w": jnp.ones((2, 5))}
    images = jnp.linspace(-1, 1, 15).reshape(3, 5).at[1, 2:4].set(jnp.nan)
    grads = dpoptax.per_example_grads(local_elbo_loss(encode, log_likelihood))(
        params, images, key=jax.random.key(0)
    )
    assert bool(jnp.isfinite(grads.stacked()["w"]).all())
    seen = ~jnp.isnan(images[1])
    for filling in (0.0, 1e30, jnp.inf):
        value = jnp.where(seen, images[1], filling)
        total, slope = jax.value_and_grad(
            lambda mean, v=value: observed_log_prob(lambda x: -0.5 * (x - mean) ** 2, v, seen)
        )(0.5)
        kept = images[1][seen]
        np.testing.assert_allclose(total, -0.5 * jnp.sum((kept - 0.5) ** 2), rtol=1e-6)
        np.testing.assert_allclose(slope, jnp.sum(kept - 0.5), rtol=1e-6)
