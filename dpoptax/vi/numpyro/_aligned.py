"""Aligned gradients for NumPyro models with a normal autoguide.

The autoguide draws the latents on the real line by loc + scale base_noise, so only the gradient
with respect to the latents has to be private. The rest is `dpoptax.vi.aligned_elbo`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import jax
import jax.numpy as jnp
import numpyro.infer.autoguide
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax._pytree import PyTree
from dpoptax.vi._aligned_elbo import AlignedElbo
from dpoptax.vi._local_model import Simulate
from dpoptax.vi.numpyro import _sites as sites
from dpoptax.vi.numpyro._elbo import NumPyroElbo, numpyro_elbo
from dpoptax.vi.numpyro._normal_autoguide import NormalAutoguide, normal_autoguide

# The likelihood given all latents draws nothing, so any key will do.
_NO_DRAWS = 0


@attrs.frozen(eq=False, kw_only=True)
class AlignedNumPyroElbo(AlignedElbo):
    """The negative ELBO of a NumPyro model with aligned gradients; see `aligned_numpyro_elbo`.

    It is a `dpoptax.training.Objective`. Latents are a dict of arrays on the real line, by site.

    Attributes:
        guide: as in `AlignedElbo`.
        log_likelihood: as in `AlignedElbo`.
        prior: as in `AlignedElbo`.
        num_examples: as in `AlignedElbo`.
        num_samples: as in `AlignedElbo`.
        keep_steps: as in `AlignedElbo`.
        source: the same model without aligned gradients.
    """

    source: NumPyroElbo
    guide: NormalAutoguide

    def init(self) -> dict[str, PyTree]:
        """Returns the initial parameters on the real line, which are trained."""
        return self.source.init()

    def constrain(self, params: PyTree) -> dict[str, PyTree]:
        """Returns the values of `numpyro.param` sites, as `Predictive` takes them."""
        return self.source.constrain(params)

    def check_data(self, data: PyTree) -> None:
        """Refuses data that the model cannot take; see `NumPyroElbo.check_data`."""
        self.source.check_data(data)

    def constrain_latents(self, latents: PyTree) -> dict[str, PyTree]:
        """Returns the values of the sites of the model, for latents on the real line."""
        return self.guide.constrain_latents(latents)

    def draw_latents(self, key: PRNGKeyArray) -> dict[str, Array]:
        """Draws latents on the real line from the prior of the model."""
        trace = self.source.program.model_trace({}, sites.repeat_example(self.source.example), key)
        values = {name: jnp.asarray(trace[name]["value"]) for name in self.guide.transforms}
        return self.guide.unconstrain_latents(values)

    def simulator(self, covariates: Callable[[PRNGKeyArray], tuple[Any, ...]]) -> Simulate:
        """Returns `simulate(key, latents)`, which draws one example from the model.

        Args:
            covariates: `covariates(key)` returns the arguments of the model for one example, with
                None for those that the model draws if it gets None. They must come from a public
                source. Arguments that were given by keyword follow in their order.

        Returns:
            A function for `calibrated_posterior`, `choose_clip` and `calibration_check`.
        """
        observed = list(self.source.model_plates)

        def simulate(key: PRNGKeyArray, latents: PyTree) -> tuple[Any, ...]:
            covariate_key, model_key = jax.random.split(key)
            given = tuple(covariates(covariate_key))
            values = self.constrain_latents(latents)
            batch = sites.repeat_example(given)
            trace = self.source.program.model_trace(values, batch, model_key)
            missing = [number for number, argument in enumerate(given) if argument is None]
            if len(given) != len(self.source.example) or len(missing) != len(observed):
                raise ValueError(
                    f"covariates must return {len(self.source.example)} arguments, of which "
                    f"{len(observed)} are None, one for each of the observed sites {observed}; got "
                    f"{len(given)}, of which {len(missing)} are None. For another model, write "
                    "simulate(key, latents) yourself."
                )
            example = list(given)
            for number, name in zip(missing, observed, strict=True):
                drawn = jnp.asarray(trace[name]["value"])[0]
                example[number] = drawn.astype(jnp.result_type(self.source.example[number]))
            return tuple(example)

        return simulate


def aligned_numpyro_elbo(
    model: Callable[..., Any],
    guide: numpyro.infer.autoguide.AutoGuide,
    *args: Any,
    num_examples: int,
    num_samples: int = 2,
    keep_steps: int = 0,
    init_key: PRNGKeyArray,
    **kwargs: Any,
) -> AlignedNumPyroElbo:
    """Turns a NumPyro model with a normal autoguide into an objective with aligned gradients.

    The scales of the guide get less noise than with `numpyro_elbo`, and `calibrated_posterior`
    works with the releases that are kept. Pass the objective to `training.fit`, and the arguments
    of the model as a tuple for the data.

    Args:
        model: as in `numpyro_elbo`; all its latents are shared by all examples.
        guide: `AutoNormal`, `AutoDiagonalNormal`, `AutoMultivariateNormal` or
            `AutoLowRankMultivariateNormal` of `numpyro.infer.autoguide`.
        *args: as in `numpyro_elbo`.
        num_examples: as in `numpyro_elbo`.
        num_samples: as in `dpoptax.vi.aligned_elbo`.
        keep_steps: as in `dpoptax.vi.aligned_elbo`.
        init_key: as in `numpyro_elbo`.
        **kwargs: as in `numpyro_elbo`.

    Returns:
        A `dpoptax.training.Objective` with `init()` and `constrain(params)` as in `numpyro_elbo`,
        and with `draw_latents(key)` and `simulator(covariates)` for simulated data.

    Raises:
        TypeError: another guide, or as in `numpyro_elbo`.
        ValueError: latents inside the plate over the data, or as in `numpyro_elbo`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, dpoptax
        >>> import numpyro.distributions as dist
        >>> def model(x):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with numpyro.plate("data", 200, subsample_size=len(x)):
        ...         numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> guide = numpyro.infer.autoguide.AutoNormal(model)
        >>> with jax.numpy_dtype_promotion("standard"):
        ...     elbo = aligned_numpyro_elbo(
        ...         model, guide, jnp.ones(200), num_examples=200, init_key=jax.random.key(0)
        ...     )
        >>> sorted(elbo.init())
        ['mean_auto_loc', 'mean_auto_scale']

    Reference: Jälkö, Prediger, Honkela and Kaski 2022, arXiv:2210.15961.
    """
    source = numpyro_elbo(
        model, guide, *args, num_examples=num_examples, init_key=init_key, **kwargs
    )
    normal = normal_autoguide(guide, source)
    example_key = jax.random.key(_NO_DRAWS)

    def densities(latents: PyTree, example: PyTree) -> Mapping[str, Array]:
        values = normal.constrain_latents(latents)
        batch = sites.repeat_example(example)
        trace = source.program.model_trace(values, batch, example_key)
        return {name: sites.log_prob(site) for name, site in sites.sample_sites(trace)}

    def log_likelihood(latents: PyTree, example: PyTree) -> Float[Array, ""]:
        found = densities(latents, example)
        own = [found[name] / plate.scale for name, plate in source.model_plates.items()]
        return jnp.stack(own).sum() / source.scale

    def log_prior(latents: PyTree) -> Float[Array, ""]:
        found = densities(latents, source.example)
        shared = [value for name, value in found.items() if name not in source.model_plates]
        return jnp.stack(shared).sum() / source.scale + normal.log_det(latents)

    return AlignedNumPyroElbo(
        guide=normal,
        log_likelihood=log_likelihood,
        prior=log_prior,
        num_examples=num_examples,
        num_samples=num_samples,
        keep_steps=keep_steps,
        source=source,
    )
