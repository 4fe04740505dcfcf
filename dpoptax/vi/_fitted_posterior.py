"""Fit of a calibrated posterior to the releases of a run, as a function that can be traced.

The likelihood of the releases depends on simulated examples, which depend on the posterior. So the
posterior is found by iteration.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax._pytree import PyTree
from dpoptax.vi._aligned_elbo import AlignedElbo
from dpoptax.vi._antithetic import balanced_normal
from dpoptax.vi._latents import guide_normal, prior_precision
from dpoptax.vi._likelihood_of_releases import (
    NoiseLevel,
    NormalLikelihood,
    SlopePrior,
    likelihood_of_releases,
)
from dpoptax.vi._local_model import (
    LocalModel,
    Simulate,
    Simulation,
    model_of_precision,
    simulated_model,
    with_simulated_change,
)
from dpoptax.vi._normal_posterior import Normal, fixed_point, normal_posterior
from dpoptax.vi._releases import Releases
from dpoptax.vi._weighted_draws import weighted_draws

# Of a simulation, the covariates may be wrong; of the guide, each scale. A wider prior makes the
# intervals of a run that has hardly settled too narrow, because the slope then is a guess.
_OF_SIMULATION = SlopePrior(each=0.1, common=0.1)
_OF_GUIDE = SlopePrior(each=0.6, common=0.0)
_NUM_SIMULATED = 4000
# Examples for what is not linear along the run: while the centre moves, and at the end.
_FEW_ALONG = 100
_ALONG = 500


class Fitted(NamedTuple):
    """A posterior, and how it came about. Under a prior without closed form it has draws."""

    posterior: Normal
    draws: Float[Array, "draws latents"] | None
    likelihood: NormalLikelihood
    clipped_fraction: Float[Array, ""]
    clip_bias: Float[Array, ""]
    distance: Float[Array, ""]
    moved: Float[Array, ""]


def central_interval(
    posterior: Normal, draws: Array | None, level: float
) -> tuple[Float[Array, " latents"], Float[Array, " latents"]]:
    """Returns the ends of the central intervals of a posterior: of its draws, if it has any."""
    if draws is not None:
        low, high = jnp.quantile(draws, jnp.array([0.5 - level / 2, 0.5 + level / 2]), axis=0)
        return low, high
    half = norm.ppf(0.5 + level / 2) * jnp.sqrt(jnp.diag(posterior.covariance))
    return posterior.mean - half, posterior.mean + half


def fitted_posterior(
    elbo: AlignedElbo,
    params: PyTree,
    releases: Releases,
    *,
    noise: NoiseLevel,
    simulate: Simulate | None,
    key: PRNGKeyArray,
) -> Fitted:
    """Returns the posterior. It can be traced, so that many runs are computed at once."""
    simulate_key, spread_key, error_key, prior_key, draw_key = jax.random.split(key, 5)
    guide = guide_normal(elbo.guide, params)

    def posterior_of(local: LocalModel, at: Normal, slope_prior: SlopePrior) -> Fitted:
        likelihood = likelihood_of_releases(releases, at.mean, local, noise, slope_prior, error_key)
        posterior = normal_posterior(likelihood, elbo.prior, guide.unravel, at.mean, prior_key)
        stddevs = jnp.sqrt(jnp.diag(posterior.covariance))
        shift = posterior.covariance @ likelihood.bias_shift
        away = posterior.mean - releases.points.mean((0, 1))
        return Fitted(
            posterior,
            None,
            likelihood,
            local.clipped_fraction,
            clip_bias=jnp.max(jnp.abs(shift) / stddevs),
            distance=jnp.max(jnp.abs(away) / releases.points.std((0, 1))),
            moved=jnp.max(jnp.abs(posterior.mean - at.mean) / stddevs),
        )

    def with_draws(found: Fitted) -> Fitted:
        if not callable(elbo.prior):
            return found
        draws = weighted_draws(
            found.likelihood, elbo.prior, guide.unravel, found.posterior, draw_key
        )
        return found._replace(draws=draws)

    centre = releases.points.mean((0, 1))
    start = Normal(centre, jnp.zeros((len(centre), len(centre))))
    if simulate is None:
        own = prior_precision(elbo.prior, guide.unravel, guide.mean)
        precision = jnp.linalg.inv(guide.covariance) - own
        local = model_of_precision(precision, noise.num_examples, centre, releases.points)
        return with_draws(posterior_of(local, start, _OF_GUIDE))
    normal = balanced_normal(spread_key, _NUM_SIMULATED, len(centre))
    simulation = Simulation(
        elbo.log_likelihood, guide.unravel, simulate, noise.l2_clip, simulate_key
    )

    def fit_at(at: Normal, num_along: int) -> Fitted:
        values, vectors = jnp.linalg.eigh(at.covariance)
        latents = at.mean + normal * jnp.sqrt(jnp.maximum(values, 0)) @ vectors.T
        local = simulated_model(simulation, at.mean, latents)
        few = latents[:num_along]
        local = with_simulated_change(local, simulation, at.mean, few, releases.points)
        return posterior_of(local, at, _OF_SIMULATION)

    # Curvature and bias belong to the posterior, so it is a fixed point.
    settled = fixed_point(lambda at: fit_at(at, _FEW_ALONG).posterior, start)
    return with_draws(fit_at(settled, _ALONG))
