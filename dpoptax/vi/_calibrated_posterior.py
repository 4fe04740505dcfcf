"""Calibrated posterior: intervals that include sampling error, privacy noise and bias of clipping.

It is computed from the releases of a run with aligned gradients, so it costs no privacy. The
releases give a normal likelihood of the latents (see `_likelihood_of_releases`), and the prior is
multiplied in. What the curvature is, and what clipping does, comes from examples that are simulated
with latents from the posterior. A regression on the releases corrects the simulated curvature.

Reference: Alrawajfeh, Jälkö and Honkela 2024, arXiv:2410.19371, for noise-aware posteriors from the
trace of gradients. They leave out the bias of clipping, and take the curvature from the trace only.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import attrs
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax import _validate
from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.vi._aligned_elbo import AlignedElbo
from dpoptax.vi._fitted_posterior import central_interval, fitted_posterior
from dpoptax.vi._latents import guide_normal
from dpoptax.vi._local_model import Simulate
from dpoptax.vi._noise_level import noise_level
from dpoptax.vi._normal_posterior import Normal
from dpoptax.vi._releases import releases_of

# A bias of clipping of this many standard deviations may dominate, and so may clipping that makes
# gradients respond to the latents by this part of what is simulated.
_LARGE_BIAS = 0.5
_SMALL_SLOPE = 0.7
# A run has not settled if its points are this many of their standard deviations from the mean, or
# if the mean still moves by this many standard deviations of the posterior.
_FAR = 3.0
_STILL_MOVES = 0.5


@attrs.frozen
class CalibratedPosterior:
    """A posterior over the latents, as `calibrated_posterior` returns it. It is public.

    It is normal if the prior is. If the prior is a log density, the posterior consists of draws.

    Attributes:
        mean: a tree like the latents; for a NumPyro model, on the real line.
        covariance: of the latents as one flat vector.
        clipped_fraction: the fraction of simulated examples that are clipped at the posterior mean.
            NaN without `simulate`.
        clip_bias: the bias that clipping causes, in standard deviations of the posterior, for the
            latent where it is largest. The mean is corrected by it, and the covariance contains
            its square. NaN without `simulate`.
        slope: how steeply the released gradients change with the latents, relative to simulated
            ones. Far below one, clipping changes more than the simulation says.
        noise_share: the part of the variance of the likelihood that is not sampling error, but
            comes from the noise of privacy and batches.
        distance: how far the mean is from the points at which gradients were taken, in their
            standard deviations, for the latent where it is largest. Far above one, the run had not
            settled.
        moved: how far the mean is from the point at which examples were simulated, in standard
            deviations of the posterior. Far above zero, the two do not agree.
    """

    mean: PyTree
    covariance: Float[Array, "latents latents"]
    clipped_fraction: float
    clip_bias: float
    slope: float
    noise_share: float
    distance: float
    moved: float
    _draws: Float[Array, "draws latents"] | None = attrs.field(repr=False)
    _unravel: Callable[[Array], PyTree] = attrs.field(repr=False)
    _constrain: Callable[[PyTree], PyTree] = attrs.field(repr=False)

    @property
    def stddev(self) -> PyTree:
        """The standard deviations, a tree like `mean`."""
        return self._unravel(jnp.sqrt(jnp.diag(self.covariance)))

    def interval(self, level: float = 0.9) -> tuple[PyTree, PyTree]:
        """Returns the ends of central intervals, two trees like `mean`."""
        mean = jax.flatten_util.ravel_pytree(self.mean)[0]
        ends = central_interval(
            Normal(mean, self.covariance), self._draws, _validate.open_unit("level", level)
        )
        return self._unravel(ends[0]), self._unravel(ends[1])

    def sample(self, key: PRNGKeyArray, num_samples: int) -> PyTree:
        """Returns draws with a leading axis; for a NumPyro model, on the supports of its sites."""
        if self._draws is None:
            factor = jnp.linalg.cholesky(self.covariance)
            normal = jax.random.normal(key, (num_samples, len(factor)))
            flat = jax.flatten_util.ravel_pytree(self.mean)[0] + normal @ factor.T
        else:
            flat = jax.random.choice(key, self._draws, (num_samples,))
        return jax.vmap(lambda one: self._constrain(self._unravel(one)))(flat)

    @property
    def statement(self) -> str:
        """Whether the run settled, and what is known of the bias of clipping, in one sentence."""
        if self.moved > _STILL_MOVES:
            return (
                "The posterior is unreliable: simulated examples at its mean move it by "
                f"{self.moved:.1f} standard deviations. Train for longer, or keep fewer steps."
            )
        if self.distance > _FAR:
            return (
                f"The run had not settled: the posterior mean is {self.distance:.1f} standard "
                "deviations of the points of gradients away from them. Train for longer, or keep "
                "fewer steps."
            )
        if math.isnan(self.clip_bias):
            return (
                "The bias of clipping is unknown, and the intervals leave it out: pass simulate to "
                "include it."
            )
        if self.slope < _SMALL_SLOPE:
            return (
                "Clipping bias may dominate: the released gradients respond to the latents "
                f"{self.slope:.2f} times as strongly as simulated ones. Choose a larger clip bound."
            )
        size = (
            f"it is {self.clip_bias:.2f} posterior standard deviations where it is largest, and "
            f"{self.clipped_fraction:.1%} of simulated examples are clipped"
        )
        if self.clip_bias > _LARGE_BIAS:
            return f"Clipping bias may dominate: {size}. Choose a larger clip bound."
        return f"Clipping bias is small: {size}."


def calibrated_posterior(
    elbo: AlignedElbo,
    params: PyTree,
    opt_state: Any,
    plan: Plan,
    *,
    simulate: Simulate | None = None,
    key: PRNGKeyArray,
) -> CalibratedPosterior:
    """Returns the posterior given what a private run released: with privacy noise and clipping.

    The guide's own intervals cover too rarely, because they contain neither. Everything here is
    post-processing of released values. The run should have settled over the steps that it kept.

    Args:
        elbo: an objective of `aligned_elbo` with `keep_steps`, and a guide that is normal.
        params: the trained parameters, `result.params`.
        opt_state: the state after the run, `result.state.opt_state`.
        plan: of the run. Clip, noise and batch size must be the same in all steps.
        simulate: `simulate(key, latents)` returns one example as the model produces it, with
            covariates from a public source. It must not use private data. Without it the curvature
            comes from the scales of the guide, and the bias of clipping is unknown.
        key: a key for simulated examples and draws. It needs no secrecy.

    Returns:
        A `CalibratedPosterior` with `mean`, `covariance`, `interval(level)`,
        `sample(key, num_samples)`, and a `statement` about the bias of clipping.

    Raises:
        KeyError: the objective kept no releases.
        TypeError: an old-style key.
        ValueError: fewer steps than it keeps; a plan with noise that changes; another guide.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> guide = dpoptax.vi.guides.MeanField(jnp.zeros(()))
        >>> elbo = dpoptax.vi.aligned_elbo(
        ...     guide, lambda mean, x: -0.5 * (x - mean) ** 2, num_examples=200, keep_steps=50
        ... )
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(200, 50),
        ...     clip=3.0, noise_multiplier=4.0, num_steps=100, delta=1e-4,
        ... )
        >>> result = dpoptax.training.fit(
        ...     elbo, guide.init(jax.random.key(0), jax.random.key(0))["params"],
        ...     1.0 + jax.random.normal(jax.random.key(1), (200,)),
        ...     plan=plan, optimizer=optax.sgd(0.1), key=jax.random.key(2), progress=False,
        ... )
        >>> posterior = calibrated_posterior(
        ...     elbo, result.params, result.state.opt_state, plan, key=jax.random.key(3),
        ...     simulate=lambda key, mean: mean + jax.random.normal(key),
        ... )
        >>> low, high = posterior.interval(0.9)
        >>> bool(low < high), bool(abs(posterior.mean - 1.0) < 4 * posterior.stddev)
        (True, True)
        >>> bool(posterior.stddev > 200**-0.5)  # what it would be without privacy
        True
        >>> posterior.statement[:26]
        'Clipping bias is small: it'

    Reference: Alrawajfeh, Jälkö and Honkela 2024, arXiv:2410.19371.
    """
    noise = noise_level(plan, elbo.num_examples)
    releases = releases_of(opt_state)
    guide = guide_normal(elbo.guide, params)
    key = _validate.typed_key("key", key)
    fit = functools.partial(fitted_posterior, elbo, noise=noise, simulate=simulate)
    found = jax.jit(fit)(params, releases, key=key)
    known = simulate is not None
    constrain = getattr(elbo, "constrain_latents", lambda latents: latents)
    posterior = found.posterior
    if found.draws is not None:
        posterior = Normal(found.draws.mean(0), jnp.atleast_2d(jnp.cov(found.draws.T)))
    return CalibratedPosterior(
        mean=guide.unravel(posterior.mean),
        covariance=posterior.covariance,
        clipped_fraction=float(found.clipped_fraction) if known else math.nan,
        clip_bias=float(found.clip_bias) if known else math.nan,
        slope=float(found.likelihood.slope),
        noise_share=float(found.likelihood.noise_share),
        distance=float(found.distance),
        moved=float(found.moved) if known else 0.0,
        draws=found.draws,
        unravel=guide.unravel,
        constrain=constrain,
    )
