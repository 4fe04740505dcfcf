"""Negative ELBO with aligned gradients: a whole batch shares its draws of the latents.

The latents are latents = f(guide_params, base_noise), and only the gradient with respect to the
latents depends on data. It is made private; the gradient with respect to the guide's parameters
follows by the chain rule through f, which is post-processing:

    d loss / d guide_params = (df / d guide_params)^T (d loss / d latents)

Reference: Jälkö, Prediger, Honkela and Kaski 2022, arXiv:2210.15961.
"""

import math
from typing import Any, NamedTuple

import attrs
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.random._derive import derive_key
from dpoptax.transforms._private import require_params
from dpoptax.vi._elbo_terms import (
    GuideModule,
    LogLikelihood,
    Prior,
    checked_log_likelihood,
    checked_num_samples,
    checked_prior,
    kl_to_prior,
    negative_log_likelihood,
)
from dpoptax.vi._kl_after_noise import add_kl_gradient
from dpoptax.vi._releases import Releases, no_releases, with_release


class AlignedState(NamedTuple):
    """The state of the private transformation, the noise of the next draws, and past releases."""

    inner: Any
    step: Int[Array, ""]
    key: PRNGKeyArray
    aligned_draws: tuple[PyTree, ...]
    releases: Releases | None = None


def _checked_keep_steps(keep_steps: int) -> int:
    return _validate.count("keep_steps", keep_steps, at_least=0)


@attrs.frozen
class AlignedElbo:
    """The negative ELBO with draws that a whole batch shares; made by `aligned_elbo`.

    It is a `dpoptax.training.Objective`.

    Attributes:
        guide: as in `global_elbo`.
        log_likelihood: as in `global_elbo`.
        prior: as in `global_elbo`.
        num_examples: as in `global_elbo`.
        num_samples: as in `aligned_elbo`.
        keep_steps: as in `aligned_elbo`.
    """

    guide: GuideModule
    log_likelihood: LogLikelihood = attrs.field(converter=checked_log_likelihood)
    prior: Prior = attrs.field(converter=checked_prior)
    num_examples: int = attrs.field(converter=_validate.num_examples)
    num_samples: int = attrs.field(converter=checked_num_samples)
    keep_steps: int = attrs.field(converter=_checked_keep_steps, default=0)

    def loss(
        self, point: tuple[PyTree, ...], example: PyTree, key: PRNGKeyArray
    ) -> Float[Array, ""]:
        """Returns the loss of one example at the draws of this step, a `gradient_point`."""
        draws = _scale_draws(point, math.sqrt(self.num_samples))
        keys = [key] if self.num_samples == 1 else jax.random.split(key, self.num_samples)
        losses = [
            negative_log_likelihood(self.log_likelihood, latents, example, draw_key)
            for latents, draw_key in zip(draws, keys, strict=True)
        ]
        return sum(losses[1:], start=losses[0]) / self.num_samples

    def kl(self, guide_params: PyTree, key: PRNGKeyArray) -> Float[Array, ""]:
        """Returns KL(q || prior): exact for a normal prior, else estimated by one draw."""
        return kl_to_prior(self.guide, self.prior, guide_params, key)

    def gradient_point(self, params: PyTree, opt_state: Any) -> tuple[PyTree, ...]:
        """Returns the latents drawn for this step, divided by the root of the number of draws.

        With this scaling the gradient at S draws has the norm of the gradient at one draw.

        Raises:
            KeyError: `opt_state` does not come from a transformation made by `wrap`.
        """
        base_noise = optax.tree_utils.tree_get(opt_state, "aligned_draws")
        if base_noise is None:
            raise KeyError(
                "the optimizer's state holds no draw for aligned gradients. Make the "
                "transformation by optax.chain(elbo.wrap(private, key), optimizer)."
            )
        return self._scaled_latents(params, base_noise)

    def wrap(
        self, private: optax.GradientTransformation, key: PRNGKeyArray
    ) -> optax.GradientTransformation:
        """Returns a transformation from gradients at the latents to ones of the guide's parameters.

        It adds the gradient of the divergence.
        """
        key = _validate.typed_key("key", key)

        def init(params: PyTree) -> AlignedState:
            step = jnp.zeros((), jnp.int32)
            base_noise = self._base_noise(params, key, step)
            point = self._scaled_latents(params, base_noise)
            releases = no_releases(self.keep_steps, point)
            return AlignedState(private.init(point), step, key, base_noise, releases)

        def update(
            updates: Any, state: AlignedState, params: Any = None
        ) -> tuple[PyTree, AlignedState]:
            params = require_params(params)
            # The same draws as those at which the gradients were taken: the state keeps them from
            # one update to the next, because `gradient_point` reads them in between.
            point, pull_back = jax.vjp(
                lambda guide_params: self._scaled_latents(guide_params, state.aligned_draws), params
            )
            noisy, inner = private.update(updates, state.inner, point)
            releases = state.releases
            if releases is not None:
                # Both without the scaling: the gradient at each draw of the latents.
                root = math.sqrt(self.num_samples)
                draws, gradients = _scale_draws(point, root), _scale_draws(noisy, root)
                releases = with_release(releases, draws, gradients)
            # The chain rule through f. It sees public values and the noisy gradient only.
            (gradient,) = pull_back(noisy)
            kl_key = jax.random.fold_in(derive_key(state.key, "divergence"), state.step)
            next_draws = self._base_noise(params, state.key, state.step + 1)
            with_kl = add_kl_gradient(gradient, self.kl, self.num_examples, params, kl_key)
            step = state.step + 1
            return with_kl, AlignedState(inner, step, state.key, next_draws, releases)

        return optax.GradientTransformation(init, update)

    def _base_noise(
        self, params: PyTree, key: PRNGKeyArray, step: Int[Array, ""]
    ) -> tuple[PyTree, ...]:
        """Draws the noise of one step, in antithetic pairs."""
        step_key = jax.random.fold_in(derive_key(key, "draw"), step)
        num_pairs = (self.num_samples + 1) // 2
        keys = [step_key] if num_pairs == 1 else jax.random.split(step_key, num_pairs)
        draws = [self.guide.apply({"params": params}, key, method="noise") for key in keys]
        negated = [jax.tree.map(jnp.negative, base_noise) for base_noise in draws]
        # An odd number of draws leaves out the last negated one.
        return (*draws, *negated)[: self.num_samples]

    def _scaled_latents(self, params: PyTree, base_noise: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        variables = {"params": params}
        draws = tuple(self.guide.apply(variables, one, method="transform") for one in base_noise)
        return _scale_draws(draws, 1 / math.sqrt(self.num_samples))


def _scale_draws(draws: tuple[PyTree, ...], factor: float) -> tuple[PyTree, ...]:
    return draws if factor == 1 else jax.tree.map(lambda leaf: factor * leaf, draws)


def aligned_elbo(
    guide: GuideModule,
    log_likelihood: LogLikelihood,
    prior: Prior = 1.0,
    *,
    num_examples: int,
    num_samples: int = 2,
    keep_steps: int = 0,
) -> AlignedElbo:
    """Makes the objective of `global_elbo` with aligned gradients: less noise in the scales.

    A whole batch shares the draws of the latents, and only the gradient with respect to the latents
    is made private. The gradient with respect to the guide's parameters follows by the chain rule,
    which costs no privacy. So the scales get no noise of their own, and they do not use up the
    clip bound. The scales always gain; the mean gains if the posterior is wide.

    The gradients at S draws are clipped and noised as one vector, divided by the root of S. This
    vector has the norm of one draw's gradient, and the mean over draws has the noise of one. So
    further draws cost time, not privacy. Draws come in pairs with opposite noise, whose errors
    cancel to first order.

    Args:
        guide: as in `global_elbo`.
        log_likelihood: as in `global_elbo`.
        prior: as in `global_elbo`.
        num_examples: as in `global_elbo`.
        num_samples: draws of the latents per step, at which every example of the batch is
            evaluated. Two are one pair; one is the published algorithm.
        keep_steps: how many of the last releases the optimizer state keeps, for
            `calibrated_posterior`. They are public.

    Returns:
        A `dpoptax.training.Objective`, to be used as in `global_elbo`. In your own training loop,
        take the gradients at `elbo.gradient_point(guide_params, opt_state)`, a tuple with the
        latents of each draw.

    Raises:
        TypeError: as in `global_elbo`.
        ValueError: as in `global_elbo`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> guide = dpoptax.vi.guides.MeanField(jnp.zeros(()))
        >>> elbo = aligned_elbo(guide, lambda mean, x: -0.5 * (x - mean) ** 2, num_examples=200)
        >>> guide_params = guide.init(jax.random.key(0), jax.random.key(0))["params"]
        >>> private = dpoptax.privatize(2.0, 1.0, expected_batch_size=20, key=jax.random.key(1))
        >>> tx = optax.chain(elbo.wrap(private, jax.random.key(2)), optax.sgd(0.1))
        >>> state = tx.init(guide_params)
        >>> point = elbo.gradient_point(guide_params, state)
        >>> grads = dpoptax.per_example_grads(elbo.loss)(point, jnp.ones(20), key=jax.random.key(3))
        >>> updates, state = tx.update(grads, state, guide_params)
        >>> sorted(updates)
        ['loc', 'raw_scale']

    Reference: Jälkö, Prediger, Honkela and Kaski 2022, arXiv:2210.15961.
    """
    return AlignedElbo(guide, log_likelihood, prior, num_examples, num_samples, keep_steps)
