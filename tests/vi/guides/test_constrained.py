"""Guides on constrained supports: their densities, and a posterior in closed form."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import dpoptax
from dpoptax.vi import aligned_elbo, global_elbo, guides

constraints = pytest.importorskip("numpyro.distributions").constraints


def start(guide):
    return guide.init(jax.random.key(0), jax.random.key(0))["params"]


@pytest.mark.seconds
def test_a_positive_latent_is_log_normal():
    guide = guides.Constrained(jnp.array(2.0), constraints.positive)
    guide_params = start(guide)
    draws = jax.vmap(lambda key: guide.apply({"params": guide_params}, key))(
        jax.random.split(jax.random.key(1), 2000)
    )
    reference = scipy.stats.lognorm(s=0.1, scale=2.0)
    assert scipy.stats.kstest(np.asarray(draws, float), reference.cdf).pvalue > 1e-3
    found = [
        float(guide.apply({"params": guide_params}, draw, method="log_prob")) for draw in draws[:5]
    ]
    np.testing.assert_allclose(found, reference.logpdf(np.asarray(draws[:5])), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [guides.MeanField, guides.FullRank, functools.partial(guides.LowRank, rank=1)]
)
def test_the_density_on_a_simplex_integrates_to_one(make):
    latents = jnp.array([0.2, 0.3, 0.5])
    guide = guides.Constrained(
        latents, constraints.simplex, make=functools.partial(make, initial_scale=0.7)
    )
    guide_params = start(guide)
    middles = (np.arange(300) + 0.5) / 300
    a, b = (part.ravel() for part in np.meshgrid(middles, middles))
    inside = a + b < 1 - 1e-3
    points = np.stack([a, b, 1 - a - b], axis=1)[inside].astype(np.float32)
    densities = jnp.exp(
        jax.vmap(lambda z: guide.apply({"params": guide_params}, z, method="log_prob"))(
            jnp.asarray(points)
        )
    )
    assert abs(float(densities.sum()) / 300**2 - 1) < 0.01
    # Where the noise is nil, the guide is where it was started.
    nil = jnp.zeros(guide.apply({"params": guide_params}, jax.random.key(0), method="noise").shape)
    np.testing.assert_allclose(
        guide.apply({"params": guide_params}, nil, method="transform"), latents, 1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("make", [global_elbo, aligned_elbo])
def test_the_rate_of_counts_finds_its_gamma_posterior(make):
    counts = jax.random.poisson(jax.random.key(0), 3.0, (500,)).astype(jnp.float32)
    posterior = scipy.stats.gamma(2.0 + float(counts.sum()), scale=1 / (1.0 + 500))
    guide = guides.Constrained({"rate": jnp.array(1.0)}, {"rate": constraints.positive})
    elbo = make(
        guide,
        lambda latents, count: count * jnp.log(latents["rate"]) - latents["rate"],
        lambda latents: jnp.log(latents["rate"]) - latents["rate"],  # Gamma(2, 1)
        num_examples=500,
    )
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(500, 500),
        clip=math.inf, noise_multiplier=0.0, num_steps=3000, delta=1e-4,
    )  # fmt: skip
    optimizer = optax.adam(optax.linear_schedule(0.02, 0.0, 3000))
    with jax.numpy_dtype_promotion("standard"):  # for Optax's schedule
        result = dpoptax.training.fit(
            elbo,
            start(guide),
            counts,
            plan=plan,
            optimizer=optimizer,
            key=dpoptax.random.insecure_key(0),
            progress=False,
        )
    found = result.params["unconstrained"]
    assert abs(math.exp(float(found["loc"]["rate"])) / posterior.mean() - 1) < 0.01
    scale = float(jax.nn.softplus(found["raw_scale"][0]))
    assert abs(scale / (posterior.std() / posterior.mean()) - 1) < 0.15


def test_wrong_arguments_are_refused():
    latents = {"rate": jnp.array(1.0)}
    with pytest.raises(ValueError, match="supports must be a tree like the latents"):
        guides.Constrained(latents, constraints.positive)
    with pytest.raises(ValueError, match="supports must be a tree like the latents"):
        guides.Constrained(latents, {"rate": "positive"})
    with pytest.raises(ValueError, match=r"latents\['rate'\] must start within its support"):
        guides.Constrained({"rate": jnp.array(-1.0)}, {"rate": constraints.positive})
    with pytest.raises(ValueError, match=r"latents\['rate'\] must start inside its support, not"):
        guides.Constrained({"rate": jnp.array(0.0)}, {"rate": constraints.unit_interval})
    with pytest.raises(TypeError, match=r"latents\['rate'\] has a support of integers"):
        guides.Constrained(latents, {"rate": constraints.nonnegative_integer})
    guide = guides.Constrained(latents, {"rate": constraints.positive})
    with pytest.raises(ValueError, match=r"Pass the log density of the latents for a prior"):
        guide.apply({"params": start(guide)}, 1.0, method="kl")
