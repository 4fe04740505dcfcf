"""A guide, a log-likelihood and a prior in, the negative ELBO as an objective out.

With latents theta that all examples share,

    -(1/N) ELBO(psi) = mean_i E_q[-log p(x_i | theta)] + (1/N) KL(q_psi || p)

on the scale of one example, so that neither the clip nor the learning rate depends on N. The first
term is a mean over examples, to be clipped and noised. The second depends on psi alone, which every
release before has made public: its gradient is added after the noise, whole and free of charge.

Reference: Jälkö, Dikmen and Honkela 2017, arXiv:1610.08749, for clipped gradients of an ELBO;
Jälkö, Prediger, Honkela and Kaski 2022, arXiv:2210.15961, for aligned gradients.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dpoptax import _validate
from dpoptax.random._derive import derive_key
from dpoptax.per_example._validate_loss import takes_key
from dpoptax.vi._kl_after_noise import AtTheParameters, plus_gradient, required

# `log_likelihood(theta, example)`, or `(theta, example, key)` for one that draws: a scalar.
LogLikelihood = Callable[..., Float[Array, ""]]
# The log density of the latents, or the scale of N(0, scale**2 I).
Prior = Callable[[PyTree], Float[Array, ""]] | float


class AlignedState(NamedTuple):
    """A `DivergenceState`, and the noise of each draw where this step takes its gradients."""

    inner: Any
    step: Int[Array, ""]
    key: PRNGKeyArray
    aligned_draws: tuple[PyTree, ...]


@dataclasses.dataclass(frozen=True)
class _Elbo:
    guide: nn.Module
    log_likelihood: LogLikelihood
    prior: Prior
    num_examples: int

    def kl(self, psi: PyTree, key: PRNGKeyArray) -> Float[Array, ""]:
        """Returns KL(q || prior): exactly for a normal prior, else by one reparameterised draw."""
        if not callable(self.prior):
            return self._guide(psi, self.prior, method="kl")
        theta = self._guide(psi, key)
        return self._guide(psi, theta, method="log_prob") - self.prior(theta)

    def _guide(self, psi: PyTree, *arguments: Any, **options: Any) -> Any:
        return self.guide.apply({"params": psi}, *arguments, **options)

    def _negative_log_likelihood(
        self, theta: PyTree, example: PyTree, key: PRNGKeyArray
    ) -> Float[Array, ""]:
        if takes_key(self.log_likelihood, "log_likelihood", "theta"):
            return -self.log_likelihood(theta, example, key)
        return -self.log_likelihood(theta, example)


@dataclasses.dataclass(frozen=True)
class GlobalElbo(_Elbo, AtTheParameters):
    """The negative ELBO for latents that all examples share; made by `global_elbo`."""

    num_samples: int
    kl_clipped: bool

    def loss(self, point: PyTree, example: PyTree, key: PRNGKeyArray) -> Float[Array, ""]:
        """The loss of one example, with draws of its own; see `Objective.loss`."""

        def one(key: PRNGKeyArray) -> Array:
            # Keys are split only where both halves are needed: every split takes time.
            if not takes_key(self.log_likelihood):
                return self._negative_log_likelihood(self._guide(point, key), example, key)
            draw_key, model_key = jax.random.split(key)
            return self._negative_log_likelihood(self._guide(point, draw_key), example, model_key)

        if not self.kl_clipped:
            return self._mean(one, key)
        kl_key, key = jax.random.split(key)
        return self._mean(one, key) + self.kl(point, kl_key) / self.num_examples


@dataclasses.dataclass(frozen=True)
class AlignedElbo(_Elbo):
    """Draws that serve a whole batch, and private gradients by them; made by `aligned_elbo`."""

    num_samples: int

    def loss(self, point: tuple[PyTree, ...], example: PyTree, key: PRNGKeyArray) -> Array:
        """The loss of one example at the draws of this step; see `Objective.loss`."""
        thetas = _scaled(point, math.sqrt(self.num_samples))
        keys = [key] if self.num_samples == 1 else jax.random.split(key, self.num_samples)
        losses = [
            self._negative_log_likelihood(theta, example, key)
            for theta, key in zip(thetas, keys, strict=True)
        ]
        return sum(losses[1:], start=losses[0]) / self.num_samples

    def point(self, params: PyTree, opt_state: Any) -> tuple[PyTree, ...]:
        """The latents drawn for this step, over the root of their number; see `Objective.point`.

        So scaled, the gradient by S draws has the norm of the gradient by one.

        Raises:
            KeyError: no part of `opt_state` is of `around`.
        """
        draws = optax.tree_utils.tree_get(opt_state, "aligned_draws")
        if draws is None:
            raise KeyError(
                "the optimizer's state holds no draw for aligned gradients. Make the "
                "transformation by optax.chain(elbo.around(private, key), optimizer)."
            )
        return self._point(params, draws)

    def around(
        self, private: optax.GradientTransformation, key: PRNGKeyArray
    ) -> optax.GradientTransformation:
        """Takes the private gradient by theta to one by psi, and adds that of the divergence.

        By the chain rule through theta = f(psi, eta), where psi and eta are public.
        """
        key = _validate.typed_key("key", key)

        def init(params: PyTree) -> AlignedState:
            step = jnp.zeros((), jnp.int32)
            draws = self._draws(params, key, step)
            return AlignedState(private.init(self._point(params, draws)), step, key, draws)

        def update(
            updates: Any, state: AlignedState, params: Any = None
        ) -> tuple[PyTree, AlignedState]:
            params = required(params)
            point, pull_back = jax.vjp(lambda psi: self._point(psi, state.aligned_draws), params)
            noisy, inner = private.update(updates, state.inner, point)
            (gradient,) = pull_back(noisy)
            kl_key = jax.random.fold_in(derive_key(state.key, "divergence"), state.step)
            draws = self._draws(params, state.key, state.step + 1)
            total = plus_gradient(gradient, self.kl, self.num_examples, params, kl_key)
            return total, AlignedState(inner, state.step + 1, state.key, draws)

        return optax.GradientTransformation(init, update)

    def _draws(self, params: PyTree, key: PRNGKeyArray, step: Int[Array, ""]) -> tuple[PyTree, ...]:
        """The noise of the draws of a step, in antithetic pairs."""
        step_key = jax.random.fold_in(derive_key(key, "draw"), step)
        halves = (self.num_samples + 1) // 2
        keys = [step_key] if halves == 1 else jax.random.split(step_key, halves)
        draws = [self._guide(params, key, method="noise") for key in keys]
        return (*draws, *(jax.tree.map(jnp.negative, eta) for eta in draws))[: self.num_samples]

    def _point(self, params: PyTree, draws: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        thetas = tuple(self._guide(params, eta, method="transform") for eta in draws)
        return _scaled(thetas, 1 / math.sqrt(self.num_samples))


def _scaled(thetas: tuple[PyTree, ...], factor: float) -> tuple[PyTree, ...]:
    return thetas if factor == 1 else jax.tree.map(lambda leaf: factor * leaf, thetas)


def global_elbo(
    guide: nn.Module,
    log_likelihood: LogLikelihood,
    prior: Prior = 1.0,
    *,
    num_examples: int,
    num_samples: int = 1,
    kl: Literal["after_noise", "clipped"] = "after_noise",
) -> GlobalElbo:
    """Makes the objective of Bayesian inference for latents that all examples share.

    Pass it to `training.fit` in place of a loss. In a loop of your own,

        tx = optax.chain(elbo.around(dpoptax.privatize(...), key), optimizer)
        grads = per_example_grads(elbo.loss)(elbo.point(psi, opt_state), examples, key=...)

    Args:
        guide: of `dpoptax.vi.guides`, for the latents theta.
        log_likelihood: `log_likelihood(theta, example)`, or `(theta, example, key)` for one that
            draws: the scalar log p(x_i | theta), or a lower bound of it where the example has
            latents of its own (minus the loss of `local_elbo_loss`).
        prior: the scale s of N(0, s**2 I), for which the divergence is exact; or the log density of
            theta, for which it is estimated by one draw per step.
        num_examples: N, a public constant.
        num_samples: draws of theta per example and step.
        kl: "after_noise" adds the gradient of the divergence where it is free; "clipped" makes it
            part of the loss of every example, as d3p does, for comparison: a clip then shrinks
            prior and likelihood together.

    Returns:
        A `dpoptax.training.Objective`.

    Raises:
        TypeError: a number of the wrong kind, a log-likelihood of another signature.
        ValueError: a number out of range, or another word for `kl`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> guide = dpoptax.vi.guides.MeanField(jnp.zeros(()))
        >>> elbo = global_elbo(guide, lambda mean, x: -0.5 * (x - mean) ** 2, num_examples=200)
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(200, 20),
        ...     clip=2.0, noise_multiplier=1.0, num_steps=50, delta=1e-4,
        ... )
        >>> psi = guide.init(jax.random.key(0), jax.random.key(0))["params"]
        >>> result = dpoptax.training.fit(
        ...     elbo, psi, jnp.ones(200), plan=plan, optimizer=optax.sgd(0.1), key=0, progress=False
        ... )
        >>> abs(float(result.params["loc"]) - 1) < 0.3
        True

    Reference: Jälkö, Dikmen and Honkela 2017, arXiv:1610.08749.
    """
    if kl not in ("after_noise", "clipped"):
        raise ValueError(f'kl is "after_noise" or "clipped"; got {kl!r}.')
    return GlobalElbo(
        *_checked(guide, log_likelihood, prior, num_examples),
        num_samples=_validate.count("num_samples", num_samples),
        kl_clipped=kl == "clipped",
    )


def aligned_elbo(
    guide: nn.Module,
    log_likelihood: LogLikelihood,
    prior: Prior = 1.0,
    *,
    num_examples: int,
    num_samples: int = 2,
) -> AlignedElbo:
    """Makes the same objective with aligned gradients: less noise, and scales that converge.

    The same draws of theta serve the batch, and only the gradient by theta is made private. That by
    the parameters of the guide follows by the chain rule, which costs nothing: the scale gets no
    noise of its own, and leaves the clip to the mean. The wider the posterior, the more the mean
    gains by that; the scales gain always.

    Gradients by S draws are clipped and noised as one vector, divided by the root of S. It has the
    norm of one draw's gradient, and their mean has the noise of one: further draws cost time, not
    privacy. Draws eta and -eta come in pairs, whose errors cancel to first order.

    Args:
        guide: as in `global_elbo`.
        log_likelihood: as in `global_elbo`.
        prior: as in `global_elbo`.
        num_examples: as in `global_elbo`.
        num_samples: draws of theta per step, which every example of the batch evaluates. Two are a
            pair; one is the published algorithm.

    Returns:
        A `dpoptax.training.Objective`, to be used as in `global_elbo`; the gradients of a loop of
        your own are taken at `elbo.point(psi, opt_state)`, a tuple with the latents of each draw.

    Raises:
        TypeError: as in `global_elbo`.
        ValueError: as in `global_elbo`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> guide = dpoptax.vi.guides.MeanField(jnp.zeros(()))
        >>> elbo = aligned_elbo(guide, lambda mean, x: -0.5 * (x - mean) ** 2, num_examples=200)
        >>> psi = guide.init(jax.random.key(0), jax.random.key(0))["params"]
        >>> private = dpoptax.privatize(2.0, 1.0, expected_batch_size=20, key=jax.random.key(1))
        >>> tx = optax.chain(elbo.around(private, jax.random.key(2)), optax.sgd(0.1))
        >>> state = tx.init(psi)
        >>> theta = elbo.point(psi, state)
        >>> grads = dpoptax.per_example_grads(elbo.loss)(theta, jnp.ones(20), key=jax.random.key(3))
        >>> updates, state = tx.update(grads, state, psi)
        >>> sorted(updates)
        ['loc', 'raw_scale']

    Reference: Jälkö, Prediger, Honkela and Kaski 2022, arXiv:2210.15961.
    """
    return AlignedElbo(
        *_checked(guide, log_likelihood, prior, num_examples),
        num_samples=_validate.count("num_samples", num_samples),
    )


def _checked(
    guide: nn.Module, log_likelihood: LogLikelihood, prior: Prior, num_examples: int
) -> tuple[nn.Module, LogLikelihood, Prior, int]:
    takes_key(log_likelihood, "log_likelihood", "theta")
    if not callable(prior):
        prior = _validate.positive("prior", prior)
    return guide, log_likelihood, prior, _validate.num_examples(num_examples)
