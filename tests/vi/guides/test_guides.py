"""Guides against SciPy's multivariate normal, and against divergences in closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.flatten_util import ravel_pytree

from dpoptax.vi import guides

LATENTS = {"a": jnp.array([0.5, -1.0]), "b": jnp.array(2.0)}
MAKE = {
    "mean field": guides.MeanField,
    "full rank": guides.FullRank,
    "low rank": lambda latents: guides.LowRank(latents, rank=2),
    "joint": lambda latents: guides.Joint(
        {"a": guides.FullRank(latents["a"]), "b": guides.MeanField(latents["b"])}
    ),
}
every_guide = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def somewhere(guide):
    """Parameters that are not the initial ones."""
    guide_params = guide.init(jax.random.key(0), jax.random.key(0))["params"]
    leaves, treedef = jax.tree.flatten(guide_params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + 0.7 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, moved)


def moments(guide, guide_params):
    """Mean and covariance, from the linear map from noise to latents."""

    def flat(base_noise):
        return ravel_pytree(guide.apply({"params": guide_params}, base_noise, method="transform"))[
            0
        ]

    base_noise = jax.tree.map(
        jnp.zeros_like, guide.apply({"params": guide_params}, jax.random.key(0), method="noise")
    )
    mean, derivative = jax.jit(lambda noise: (flat(noise), jax.jacobian(flat)(noise)))(base_noise)
    factor = np.concatenate([np.asarray(part) for part in jax.tree.leaves(derivative)], axis=1)
    return np.asarray(mean), factor @ factor.T


@every_guide
def test_the_initial_location_is_the_given_one(make):
    guide = make(LATENTS)
    guide_params = guide.init(jax.random.key(0), jax.random.key(0))["params"]
    mean, covariance = moments(guide, guide_params)
    np.testing.assert_allclose(mean, ravel_pytree(LATENTS)[0], rtol=1e-6)
    assert np.all(np.diag(covariance) >= 0.1**2 * 0.999)
    latents = guide.apply({"params": guide_params}, jax.random.key(1))
    assert jax.tree.structure(latents) == jax.tree.structure(LATENTS)


@pytest.mark.slow
@every_guide
def test_log_density_and_divergence_are_those_of_the_multivariate_normal(make):
    guide = make(LATENTS)
    guide_params = somewhere(guide)
    mean, covariance = moments(guide, guide_params)
    reference = scipy.stats.multivariate_normal(mean, covariance)
    for seed in range(3):
        latents = guide.apply({"params": guide_params}, jax.random.key(seed))
        found = guide.apply({"params": guide_params}, latents, method="log_prob")
        assert abs(float(found) - reference.logpdf(ravel_pytree(latents)[0])) < 1e-3
    scale, size = 1.7, len(mean)
    expected = 0.5 * (
        (np.trace(covariance) + mean @ mean) / scale**2
        - size
        + 2 * size * math.log(scale)
        - np.linalg.slogdet(covariance)[1]
    )
    found = guide.apply({"params": guide_params}, scale, method="kl")
    assert abs(float(found) - expected) < 1e-4 * max(1.0, expected)


@pytest.mark.slow
@every_guide
def test_draws_have_the_distribution_of_the_density(make):
    guide = make(LATENTS)
    guide_params = somewhere(guide)
    mean, covariance = moments(guide, guide_params)
    n = 20_000
    draw = jax.jit(
        jax.vmap(lambda key: ravel_pytree(guide.apply({"params": guide_params}, key))[0])
    )
    draws = draw(jax.random.split(jax.random.key(2), n))
    standard = np.linalg.solve(np.linalg.cholesky(covariance), (np.asarray(draws) - mean).T)
    assert np.abs(standard.mean(1)).max() < 4.5 / math.sqrt(n)
    assert np.abs(np.cov(standard) - np.eye(len(mean))).max() < 5 * math.sqrt(2 / n)


def test_a_point_has_one_value_and_costs_nothing():
    guide = guides.Point(LATENTS)
    guide_params = guide.init(jax.random.key(0), jax.random.key(0))["params"]
    latents = guide.apply({"params": guide_params}, jax.random.key(1))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, latents, LATENTS))
    assert guide.apply({"params": guide_params}, 1.0, method="kl") == 0
    assert guide.apply({"params": guide_params}, latents, method="log_prob") == 0


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match=r"latents\['n'\] must be floating-point.*sum over them"):
        guides.MeanField({"n": jnp.zeros(3, jnp.int32)})
    with pytest.raises(ValueError, match="a guide needs latents"):
        guides.FullRank({})
    with pytest.raises(ValueError, match="initial_scale must be positive"):
        guides.MeanField(LATENTS, initial_scale=0.0)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        guides.LowRank(LATENTS, rank=0)
    with pytest.raises(ValueError, match="at least one guide"):
        guides.Joint({})
