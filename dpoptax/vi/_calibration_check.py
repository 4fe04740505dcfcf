"""Simulation-based calibration of a plan: coverage and width of its intervals, before any data.

Each world draws latents from the prior and data from the model, trains privately under the plan,
and computes the calibrated posterior. All worlds run in one program. No data are touched.

Reference: Talts et al. 2018, arXiv:1804.06788, for simulation-based calibration.
"""

import functools
import math
from typing import Any, NamedTuple

import attrs
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.scipy.stats import norm
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from dpoptax import _validate
from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.per_example import per_example_grads
from dpoptax.samplers import take
from dpoptax.transforms import chain
from dpoptax.vi._aligned_elbo import AlignedElbo
from dpoptax.vi._fitted_posterior import central_interval, fitted_posterior
from dpoptax.vi._latents import DrawLatents, guide_normal, initial_params, prior_sampler
from dpoptax.vi._likelihood_of_releases import NoiseLevel, ideal_likelihood
from dpoptax.vi._local_model import Simulate, Simulation, simulated_model
from dpoptax.vi._noise_level import noise_level
from dpoptax.vi._normal_posterior import Normal, normal_posterior
from dpoptax.vi._releases import releases_of

_NUM_SIMULATED = 2000
# Worlds that are trained at the same time: more need more memory, and hardly less time.
_AT_ONCE = 20
# Intervals that are wider than this part of those of the prior say little.
_WIDE = 0.9
# A coverage this far from the nominal one counts as calibrated.
_TOLERANCE = 0.04
_LARGE_BIAS = 0.5


class Worlds(NamedTuple):
    """One row for each world, and one column for each latent.

    Attributes:
        covered: whether the interval contains the latent that the data were simulated with.
        guide_covered: likewise for the interval of the guide itself.
        width: of the interval.
        needed_width: of the narrowest interval: sampling error, and the noise of all steps.
        width_without_privacy: with sampling error alone.
        clip_bias: as in `CalibratedPosterior`.
        slope: as in `CalibratedPosterior`.
    """

    covered: Bool[Array, "worlds latents"]
    guide_covered: Bool[Array, "worlds latents"]
    width: Float[Array, "worlds latents"]
    needed_width: Float[Array, "worlds latents"]
    width_without_privacy: Float[Array, "worlds latents"]
    clip_bias: Float[Array, " worlds"]
    slope: Float[Array, " worlds"]


@attrs.frozen
class CalibrationCheck:
    """How often and how tightly the intervals of a plan cover, as `calibration_check` returns it.

    Attributes:
        level: the nominal coverage.
        coverage: how often intervals contained the latent, over all worlds and latents.
        standard_error: of the coverage, from the differences between worlds.
        guide_coverage: how often the intervals of the guide itself did.
        width: mean width of the intervals, a tree like the latents.
        width_ratio: mean width over that of the narrowest intervals that the noise allows.
        privacy_ratio: mean width over that of intervals without privacy.
        prior_ratio: mean width over that of intervals of the prior.
        clip_bias: the bias of clipping in posterior standard deviations, largest latent, mean.
        worlds: the numbers of each world.
    """

    level: float
    coverage: float
    standard_error: float
    guide_coverage: float
    width: PyTree
    width_ratio: float
    privacy_ratio: float
    prior_ratio: float
    clip_bias: float
    worlds: Worlds = attrs.field(repr=False)

    @property
    def calibrated(self) -> bool:
        """Whether the coverage is the nominal one, up to 0.04 and one standard error."""
        return abs(self.coverage - self.level) <= _TOLERANCE + self.standard_error

    @property
    def statement(self) -> str:
        """The result in words; says if the plan cannot give calibrated intervals, and why."""
        numbers = (
            f"{self.level:.0%} intervals cover {self.coverage:.1%} (standard error "
            f"{self.standard_error:.1%}), are {self.privacy_ratio:.2f} times as wide as without "
            f"privacy, and {self.width_ratio:.2f} times as wide as the noise requires."
        )
        reasons = []
        if self.clip_bias > _LARGE_BIAS:
            reasons.append(
                f"clipping moves latents by {self.clip_bias:.1f} standard deviations: use a larger "
                "clip bound, see choose_clip"
            )
        if self.prior_ratio > _WIDE:
            reasons.append(
                f"intervals are {self.prior_ratio:.2f} times as wide as those of the prior: the "
                "data add little at this epsilon"
            )
        if self.calibrated and not reasons:
            return f"The plan gives calibrated intervals. {numbers}"
        if self.calibrated:
            return f"{numbers} But {'; '.join(reasons)}."
        reasons = reasons or ["train for longer, or keep fewer steps: the run may not settle"]
        return f"The plan does not give calibrated intervals. {numbers} {'; '.join(reasons)}."


def calibration_check(
    elbo: AlignedElbo,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    simulate: Simulate,
    *,
    draw_latents: DrawLatents | None = None,
    num_worlds: int = 40,
    level: float = 0.9,
    key: PRNGKeyArray,
) -> CalibrationCheck:
    """Tries a plan on simulated data: how wide the intervals are, and how often they cover.

    In each world, latents are drawn from the prior, data are simulated, and the whole private run
    is done under the plan. Nothing here sees real data, so it costs no privacy.

    Args:
        elbo: an objective of `aligned_elbo` with `keep_steps`, as for the real run.
        plan: of the real run.
        optimizer: of the real run.
        simulate: as in `calibrated_posterior`.
        draw_latents: `draw_latents(key)` returns latents from the prior. It is needed if the prior
            is a log density; NumPyro models have it already.
        num_worlds: how many data sets to simulate. With 40, the standard error of the coverage is
            about 0.02.
        level: nominal coverage.
        key: a key for the simulation. It needs no secrecy.

    Returns:
        A `CalibrationCheck` with `coverage`, `standard_error`, `width` and a `statement`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an objective without `keep_steps`, more than the steps of the plan, or as in
            `calibrated_posterior`.

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
        >>> check = calibration_check(
        ...     elbo, plan, optax.sgd(0.1), lambda key, mean: mean + jax.random.normal(key),
        ...     num_worlds=60, key=jax.random.key(0),
        ... )
        >>> check.calibrated, check.privacy_ratio > 1
        (True, True)

    Reference: Talts et al. 2018, arXiv:1804.06788.
    """
    noise = noise_level(plan, elbo.num_examples)
    level = _validate.open_unit("level", level)
    num_worlds = _validate.count("num_worlds", num_worlds, at_least=2)
    key = _validate.typed_key("key", key)
    if not 2 <= elbo.keep_steps <= plan.num_steps:
        raise ValueError(
            f"the objective must keep between 2 and {plan.num_steps} steps, those of the plan; got "
            f"keep_steps={elbo.keep_steps}."
        )
    draw = prior_sampler(elbo, draw_latents)
    one_world = functools.partial(
        _world, elbo=elbo, plan=plan, optimizer=optimizer, simulate=simulate, draw=draw,
        noise=noise, level=level,
    )  # fmt: skip
    keys = jax.random.split(key, num_worlds)
    at_once = min(_AT_ONCE, num_worlds)
    worlds = jax.jit(lambda keys: jax.lax.map(one_world, keys, batch_size=at_once))(keys)
    prior = jax.vmap(lambda key: ravel_pytree(draw(key))[0])(jax.random.split(key, 1000))
    of_prior = 2 * norm.ppf(0.5 + level / 2) * jnp.std(prior, axis=0)
    per_world = worlds.covered.mean(1)
    return CalibrationCheck(
        level=level,
        coverage=float(per_world.mean()),
        standard_error=_standard_error(per_world, worlds.covered.shape[1], level),
        guide_coverage=float(worlds.guide_covered.mean()),
        width=guide_normal(elbo.guide, initial_params(elbo)).unravel(worlds.width.mean(0)),
        width_ratio=float(jnp.mean(worlds.width / worlds.needed_width)),
        privacy_ratio=float(jnp.mean(worlds.width / worlds.width_without_privacy)),
        prior_ratio=float(jnp.mean(worlds.width / of_prior)),
        clip_bias=float(worlds.clip_bias.mean()),
        worlds=worlds,
    )


def train_in_world(
    elbo: AlignedElbo,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    data: PyTree,
    key: PRNGKeyArray,
) -> tuple[PyTree, Any]:
    """Trains on simulated data by the parts of a plan; returns parameters and optimizer state.

    `fit` does the same with checks, records and keys for data that are private.
    """
    noise_key, draw_key, sampling_key, model_key = jax.random.split(key, 4)
    tx = chain(elbo.wrap(plan.privatize(noise_key), draw_key), optimizer)
    grads_of = per_example_grads(elbo.loss, allow_unused=True)

    def step(carry: Any, number: Array) -> tuple[Any, None]:
        params, opt_state, sampler_state = carry
        sampler_state, batch = plan.sampler.sample(sampler_state)
        point = elbo.gradient_point(params, opt_state)
        examples = take(data, batch)
        grads = grads_of(point, examples, key=jax.random.fold_in(model_key, number))
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, sampler_state), None

    params = initial_params(elbo)
    start = (params, tx.init(params), plan.sampler.init(sampling_key))
    (params, opt_state, _), _ = jax.lax.scan(step, start, jnp.arange(plan.num_steps))
    return params, opt_state


def _world(
    key: PRNGKeyArray,
    *,
    elbo: AlignedElbo,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    simulate: Simulate,
    draw: DrawLatents,
    noise: NoiseLevel,
    level: float,
) -> Worlds:
    """Returns one row: a private run on simulated data."""
    latents_key, data_key, run_key, fit_key, model_key = jax.random.split(key, 5)
    latents = draw(latents_key)
    example_keys = jax.random.split(data_key, elbo.num_examples)
    data = jax.vmap(simulate, in_axes=(0, None))(example_keys, latents)
    params, opt_state = train_in_world(elbo, plan, optimizer, data, run_key)
    releases = releases_of(opt_state)
    found = fitted_posterior(elbo, params, releases, noise=noise, simulate=simulate, key=fit_key)
    guide = guide_normal(elbo.guide, params)
    true = ravel_pytree(latents)[0]
    simulation = Simulation(elbo.log_likelihood, guide.unravel, simulate, noise.l2_clip, model_key)
    local = simulated_model(simulation, true, jnp.tile(true, (_NUM_SIMULATED, 1)))
    half = norm.ppf(0.5 + level / 2)

    def width(stddev_of_noise: float) -> Array:
        best = ideal_likelihood(local.curvature, stddev_of_noise, noise.num_examples, true)
        ideal = normal_posterior(best, elbo.prior, guide.unravel, true, model_key)
        return 2 * half * jnp.sqrt(jnp.diag(ideal.covariance))

    def covered(ends: tuple[Array, Array]) -> Array:
        return (ends[0] < true) & (true < ends[1])

    interval = central_interval(found.posterior, found.draws, level)
    of_guide = central_interval(Normal(guide.mean, guide.covariance), None, level)
    return Worlds(
        covered=covered(interval),
        guide_covered=covered(of_guide),
        width=interval[1] - interval[0],
        needed_width=width(noise.stddev / math.sqrt(plan.num_steps)),
        width_without_privacy=width(0.0),
        clip_bias=found.clip_bias,
        slope=found.likelihood.slope,
    )


def _standard_error(per_world: Array, num_latents: int, level: float) -> float:
    """Returns the standard error of the mean, at least that of independent latents."""
    spread = float(jnp.std(per_world, ddof=1)) / math.sqrt(len(per_world))
    return max(spread, math.sqrt(level * (1 - level) / (len(per_world) * num_latents)))
