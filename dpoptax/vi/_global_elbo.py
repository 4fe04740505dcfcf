"""Negative ELBO for latents that all examples share, with a draw of the latents per example.

    -(1/N) ELBO(guide_params) = mean_i E_q[-log p(x_i | latents)] + (1/N) KL(q || p)

The expectation is estimated by reparameterised draws, latents = f(guide_params, base_noise). The
gradient of the first term is clipped and noised, that of the second is added after the noise.

Reference: Jälkö, Dikmen and Honkela 2017, arXiv:1610.08749.
"""

from typing import Any, Literal

import attrs
import jax
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.vi._elbo_terms import (
    GuideModule,
    LogLikelihood,
    Prior,
    checked_log_likelihood,
    checked_num_samples,
    checked_prior,
    is_kl_clipped,
    kl_to_prior,
    mean_over_draws,
    negative_log_likelihood,
    takes_likelihood_key,
)
from dpoptax.vi._kl_after_noise import add_kl_after_noise


@attrs.frozen
class GlobalElbo:
    """The negative ELBO for latents that all examples share; made by `global_elbo`.

    It is a `dpoptax.training.Objective`.

    Attributes:
        guide: as in `global_elbo`.
        log_likelihood: as in `global_elbo`.
        prior: as in `global_elbo`.
        num_examples: as in `global_elbo`.
        num_samples: as in `global_elbo`.
        kl_clipped: whether the divergence is part of the loss of every example.
    """

    guide: GuideModule
    log_likelihood: LogLikelihood = attrs.field(converter=checked_log_likelihood)
    prior: Prior = attrs.field(converter=checked_prior)
    num_examples: int = attrs.field(converter=_validate.num_examples)
    num_samples: int = attrs.field(converter=checked_num_samples)
    kl_clipped: bool

    def loss(self, point: PyTree, example: PyTree, key: PRNGKeyArray) -> Float[Array, ""]:
        """Returns the loss of one example at its own draws of the latents."""

        def with_one_draw(key: PRNGKeyArray) -> Array:
            draw_key = model_key = key
            # Split only where both halves are needed: a split takes time, in every example.
            if takes_likelihood_key(self.log_likelihood):
                draw_key, model_key = jax.random.split(key)
            latents = self.guide.apply({"params": point}, draw_key)
            return negative_log_likelihood(self.log_likelihood, latents, example, model_key)

        if not self.kl_clipped:
            return mean_over_draws(with_one_draw, key, self.num_samples)
        kl_key, key = jax.random.split(key)
        expected = mean_over_draws(with_one_draw, key, self.num_samples)
        return expected + self.kl(point, kl_key) / self.num_examples

    def kl(self, guide_params: PyTree, key: PRNGKeyArray) -> Float[Array, ""]:
        """Returns KL(q || prior): exact for a normal prior, else estimated by one draw."""
        return kl_to_prior(self.guide, self.prior, guide_params, key)

    def gradient_point(self, params: PyTree, opt_state: Any) -> PyTree:
        """Returns the parameters: the gradients are taken there."""
        del opt_state
        return params

    def wrap(
        self, private: optax.GradientTransformation, key: PRNGKeyArray
    ) -> optax.GradientTransformation:
        """Returns `private` with the gradient of the divergence added after the noise."""
        # Then the divergence is in the loss already; adding it here would count it twice.
        if self.kl_clipped:
            return private
        return add_kl_after_noise(private, self.kl, self.num_examples, key)


def global_elbo(
    guide: GuideModule,
    log_likelihood: LogLikelihood,
    prior: Prior = 1.0,
    *,
    num_examples: int,
    num_samples: int = 1,
    kl: Literal["after_noise", "clipped"] = "after_noise",
) -> GlobalElbo:
    """Makes the objective of Bayesian inference for latents that all examples share.

    Pass it to `training.fit` in place of a loss. In your own training loop, write

        tx = optax.chain(elbo.wrap(dpoptax.privatize(...), key), optimizer)
        point = elbo.gradient_point(guide_params, opt_state)
        grads = per_example_grads(elbo.loss)(point, examples, key=...)

    Args:
        guide: a guide of `dpoptax.vi.guides` for the latents.
        log_likelihood: `log_likelihood(latents, example)`, or `(latents, example, key)` for one
            that draws: the scalar log p(x_i | latents). If an example has local latents too, a
            lower bound of it: minus the loss of `local_elbo_loss`.
        prior: the scale s of N(0, s**2 I), for which the divergence is exact; or the log density of
            the latents, for which the divergence is estimated by one draw per step.
        num_examples: N, a public constant.
        num_samples: draws of the latents per example and step.
        kl: "after_noise" adds the gradient of the divergence after the noise, where it costs no
            privacy. "clipped" makes the divergence part of the loss of every example, as d3p does;
            the clip then shrinks prior and likelihood together. Use it for comparison.

    Returns:
        A `dpoptax.training.Objective`.

    Raises:
        TypeError: an argument of the wrong type, or a log-likelihood with another signature.
        ValueError: a number out of range, or another word for `kl`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> guide = dpoptax.vi.guides.MeanField(jnp.zeros(()))
        >>> elbo = global_elbo(guide, lambda mean, x: -0.5 * (x - mean) ** 2, num_examples=200)
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(200, 20),
        ...     clip=2.0, noise_multiplier=1.0, num_steps=50, delta=1e-4,
        ... )
        >>> guide_params = guide.init(jax.random.key(0), jax.random.key(0))["params"]
        >>> result = dpoptax.training.fit(
        ...     elbo, guide_params, jnp.ones(200),
        ...     plan=plan, optimizer=optax.sgd(0.1), key=jax.random.key(0), progress=False,
        ... )
        >>> abs(float(result.params["loc"]) - 1) < 0.3
        True

    Reference: Jälkö, Dikmen and Honkela 2017, arXiv:1610.08749.
    """
    return GlobalElbo(
        guide, log_likelihood, prior, num_examples, num_samples, kl_clipped=is_kl_clipped(kl)
    )
