"""The two terms of an ELBO: the log-likelihood of one example, and the divergence from the prior.

With latents that all examples share, on the scale of one example,

    -(1/N) ELBO(guide_params) = mean_i E_q[-log p(x_i | latents)] + (1/N) KL(q || p)

so that neither the clip nor the learning rate depends on N. The first term is a mean over examples:
its gradient is clipped and noised. The second depends on the guide's parameters alone.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.per_example._validate_loss import takes_key

# `log_likelihood(latents, example)`, or `(latents, example, key)` for one that draws: a scalar.
LogLikelihood = Callable[..., Float[Array, ""]]
# The log density of the latents, or the scale of N(0, scale**2 I).
Prior = Callable[[PyTree], Float[Array, ""]] | float


@runtime_checkable
class GuideModule(Protocol):
    """What an ELBO calls of a guide. It spares this package an import of Flax."""

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of `dpoptax.vi.guides.Guide`; see `flax.linen.Module.apply`."""


def takes_likelihood_key(log_likelihood: LogLikelihood) -> bool:
    """Whether the log-likelihood is `(latents, example, key)`; refuses any other signature."""
    return takes_key(log_likelihood, "log_likelihood", "latents")


def negative_log_likelihood(
    log_likelihood: LogLikelihood, latents: PyTree, example: PyTree, key: PRNGKeyArray
) -> Float[Array, ""]:
    """Returns -log p(example | latents), with the key where it is taken."""
    if takes_likelihood_key(log_likelihood):
        return -log_likelihood(latents, example, key)
    return -log_likelihood(latents, example)


def kl_to_prior(
    guide: GuideModule, prior: Prior, guide_params: PyTree, key: PRNGKeyArray
) -> Float[Array, ""]:
    """Returns KL(q || prior): exact for a normal prior, else estimated by one draw."""
    variables = {"params": guide_params}
    if not callable(prior):
        return guide.apply(variables, prior, method="kl")
    latents = guide.apply(variables, key)
    return guide.apply(variables, latents, method="log_prob") - prior(latents)


def mean_over_draws(
    function: Callable[[PRNGKeyArray], Float[Array, ""]], key: PRNGKeyArray, num_samples: int
) -> Float[Array, ""]:
    """Returns the mean of a function of a key over `num_samples` keys."""
    if num_samples == 1:
        # Without a split: it takes time, in every example and step.
        return function(key)
    return jnp.mean(jax.vmap(function)(jax.random.split(key, num_samples)))


def checked_log_likelihood(log_likelihood: LogLikelihood) -> LogLikelihood:
    """Returns the log-likelihood; refuses a wrong signature."""
    takes_likelihood_key(log_likelihood)
    return log_likelihood


def checked_prior(prior: Prior) -> Prior:
    """Returns the prior; refuses a scale that is not positive."""
    return prior if callable(prior) else _validate.positive("prior", prior)


def checked_num_samples(num_samples: int) -> int:
    """Returns the number of draws; refuses one that is not whole or below 1."""
    return _validate.count("num_samples", num_samples)


def is_kl_clipped(kl: str) -> bool:
    """Whether the divergence is clipped with the loss; refuses an unknown word."""
    if kl not in ("after_noise", "clipped"):
        raise ValueError(f'kl must be "after_noise" or "clipped"; got {_validate.described(kl)}.')
    return kl == "clipped"
