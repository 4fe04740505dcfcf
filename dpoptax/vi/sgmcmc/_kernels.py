"""SGLD, SGHMC and SGNHT of BlackJAX as Optax optimizers on private gradients.

The noise of the private gradient drives the chain in place of a part of the noise that the sampler
would inject. So the sampler injects only what is missing.

Reference: Wang, Fienberg and Smola 2015, "Privacy for free", arXiv:1502.07645; Li, Chen, Carin et
al. 2019, "On connecting stochastic gradient MCMC and differential privacy", arXiv:1712.09097.
"""

from typing import Any, NamedTuple

import attrs
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dpoptax import _validate
from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.random import derive_key
from dpoptax.schedules import as_schedule
from dpoptax.transforms._private import require_params
from dpoptax.vi._elbo_terms import Prior, checked_prior
from dpoptax.vi.sgmcmc._log_density import (
    check_plan,
    gradient_noise_stddev,
    log_posterior_gradient,
    moves,
)


class KernelState(NamedTuple):
    """The state of a kernel.

    Attributes:
        step: how many steps were made.
        key: for the noise that the sampler injects. No guarantee rests on its secrecy.
        momentum: like the position; empty for SGLD.
        friction: of the thermostat; empty for the others.
    """

    step: Int[Array, ""]
    key: PRNGKeyArray
    momentum: PyTree = ()
    friction: PyTree = ()


def _step_size(value: float) -> float:
    return _validate.positive("step_size", value)


def _alpha(value: float) -> float:
    return _validate.positive("alpha", value)


def _num_integration_steps(value: int) -> int:
    return _validate.count("num_integration_steps", value)


@attrs.frozen
class SGLD:
    """Stochastic gradient Langevin dynamics, by `blackjax.sgld`.

        θ' = θ + step_size G + sqrt(max(0, 2 step_size - step_size² s²)) N(0, I)

    G is the private gradient of the log posterior, and s the standard deviation of its noise.
    Together, injected and private noise have the variance max(2 step_size, step_size² s²). So up
    to step_size = 2 / s² privacy adds nothing to the variance of the chain. Beyond that the chain
    samples the posterior at a higher `temperature`: a normal posterior has that many times its
    variance.

    Two errors remain. The noise of drawing batches comes on top, unless batches are as large as the
    data. And steps are not infinitely small: for a normal posterior of precision A, the variance is
    that of the posterior divided by 1 - step_size A / 2.

    Attributes:
        step_size: a positive number.

    Raises:
        ValueError: the step size is not positive.

    Example:
        >>> import dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(100, 100), clip=1.0, noise_multiplier=10.0,
        ...     num_steps=50, delta=1e-4,
        ... )
        >>> SGLD(0.001).temperature(plan), SGLD(0.04).temperature(plan)
        (1.0, 2.0)

    Reference: Welling and Teh 2011, "Bayesian learning via stochastic gradient Langevin dynamics";
    Wang, Fienberg and Smola 2015, arXiv:1502.07645, section 4, for privacy.
    """

    step_size: float = attrs.field(converter=_step_size)

    def temperature(self, plan: Plan) -> float:
        """Returns the temperature that the chain samples at: 1 is the posterior."""
        check_plan(plan)
        return max(1.0, self.step_size * _largest_noise(plan) ** 2 / 2)

    def optimizer(
        self, plan: Plan, prior: Prior, *, key: PRNGKeyArray
    ) -> optax.GradientTransformation:
        """Returns the kernel as an optimizer for runs of a plan; see `sample`."""
        kernel = _blackjax().sgld(lambda position, minibatch: minibatch)

        def step(state: KernelState, position: PyTree, gradient: PyTree, noise: Any) -> Any:
            tempered = jnp.maximum(0.0, 1 - self.step_size * noise**2 / 2)
            new = kernel.step(_key(state), position, gradient, self.step_size, tempered)
            return new, state

        return _optimizer(plan, prior, key, lambda position, key: ((), ()), step)


@attrs.frozen
class SGHMC:
    """Stochastic gradient Hamiltonian Monte Carlo, by BlackJAX's diffusion of `blackjax.sghmc`.

        θ' = θ + step_size p
        p' = (1 - a step_size) p + step_size G + sqrt(step_size (2 a - step_size s²)) N(0, I)

    G is the private gradient of the log posterior, s the standard deviation of its noise, and
    a = max(alpha, step_size s² / 2) the friction. Friction takes up the noise of privacy, so the
    chain samples the posterior at temperature 1, whatever s is. It needs a step_size < 1: with much
    noise, small steps. The noise of drawing batches comes on top.

    Attributes:
        step_size: a positive number.
        alpha: the friction without noise.
        num_integration_steps: after how many steps the momentum is drawn again.

    Raises:
        TypeError: a number of steps is not whole.
        ValueError: a number is not positive.

    Example:
        >>> SGHMC(0.01).num_integration_steps
        10

    Reference: Chen, Fox and Guestrin 2014, arXiv:1402.4102; Li et al. 2019, arXiv:1712.09097.
    """

    step_size: float = attrs.field(converter=_step_size)
    alpha: float = attrs.field(default=1.0, converter=_alpha)
    num_integration_steps: int = attrs.field(default=10, converter=_num_integration_steps)

    def temperature(self, plan: Plan) -> float:
        """Returns the temperature that the chain samples at, which is 1, the posterior."""
        self._check(plan)
        return 1.0

    def optimizer(
        self, plan: Plan, prior: Prior, *, key: PRNGKeyArray
    ) -> optax.GradientTransformation:
        """Returns the kernel as an optimizer for runs of a plan; see `sample`."""
        self._check(plan)
        diffusions = _blackjax().sgmcmc.diffusions

        def start(position: PyTree, key: PRNGKeyArray) -> tuple[PyTree, PyTree]:
            return _momentum(key, position), ()

        def step(state: KernelState, position: PyTree, gradient: PyTree, noise: Any) -> Any:
            friction = jnp.maximum(self.alpha, self.step_size * noise**2 / 2)
            fresh = _momentum(derive_key(_key(state), "momentum"), position)
            again = state.step % self.num_integration_steps == 0
            momentum = jax.tree.map(
                lambda new, old: jnp.where(again, new, old), fresh, state.momentum
            )
            diffusion = diffusions.sghmc(friction, noise**2)
            new, momentum = diffusion(_key(state), position, momentum, gradient, self.step_size)
            return new, state._replace(momentum=momentum)

        return _optimizer(plan, prior, key, start, step)

    def _check(self, plan: Plan) -> None:
        check_plan(plan)
        friction = max(self.alpha, self.step_size * _largest_noise(plan) ** 2 / 2)
        if friction * self.step_size >= 1:
            raise ValueError(
                "step_size times friction must be below 1, or the momentum changes its sign in "
                f"each step; got {friction * self.step_size:.3g}. Pass a step_size below "
                f"{min(1 / self.alpha, 2**0.5 / _largest_noise(plan)):.3g}."
            )


@attrs.frozen
class SGNHT:
    """Stochastic gradient Nosé-Hoover thermostat, by `blackjax.sgnht`.

    The friction adapts until the momentum has temperature 1. So it takes up noise of unknown size:
    that of drawing batches as well as that of privacy. The sampler injects
    max(0, 2 alpha - step_size s²) per unit of time, with s the standard deviation of the noise of
    privacy, and the friction starts where it belongs if there is no other noise.

    Attributes:
        step_size: a positive number.
        alpha: the friction without noise.

    Raises:
        ValueError: a number is not positive.

    Example:
        >>> SGNHT(0.01).alpha
        1.0

    Reference: Ding et al. 2014, "Bayesian sampling using stochastic gradient thermostats".
    """

    step_size: float = attrs.field(converter=_step_size)
    alpha: float = attrs.field(default=1.0, converter=_alpha)

    def temperature(self, plan: Plan) -> float:
        """Returns the temperature that the chain samples at, which is 1, the posterior."""
        check_plan(plan)
        return 1.0

    def optimizer(
        self, plan: Plan, prior: Prior, *, key: PRNGKeyArray
    ) -> optax.GradientTransformation:
        """Returns the kernel as an optimizer for runs of a plan; see `sample`."""
        blackjax = _blackjax()

        def friction_of(noise: Any) -> Float[Array, ""]:
            return jnp.maximum(jnp.asarray(self.alpha), self.step_size * noise**2 / 2)

        def start(position: PyTree, key: PRNGKeyArray) -> tuple[PyTree, PyTree]:
            return _momentum(key, position), friction_of(gradient_noise_stddev(plan, 0))

        def step(state: KernelState, position: PyTree, gradient: PyTree, noise: Any) -> Any:
            known = jnp.minimum(noise**2, 2 * self.alpha / self.step_size)
            kernel = blackjax.sgnht(lambda position, minibatch: minibatch, self.alpha, known)
            state_of_kernel = blackjax.sgmcmc.sgnht.SGNHTState(
                position, state.momentum, state.friction
            )
            new = kernel.step(_key(state), state_of_kernel, gradient, self.step_size)
            return new.position, state._replace(momentum=new.momentum, friction=new.xi)

        return _optimizer(plan, prior, key, start, step)


Kernel = SGLD | SGHMC | SGNHT


def _optimizer(
    plan: Plan, prior: Prior, key: PRNGKeyArray, start: Any, step: Any
) -> optax.GradientTransformation:
    """Returns a kernel as a transformation from private gradients of the mean loss to moves."""
    check_plan(plan)
    prior = checked_prior(prior)
    key = _validate.typed_key("key", key)

    def init(position: PyTree) -> KernelState:
        momentum, friction = start(position, derive_key(key, "start"))
        return KernelState(jnp.zeros((), jnp.int32), key, momentum, friction)

    def update(
        updates: PyTree, state: KernelState, params: Any = None
    ) -> tuple[PyTree, KernelState]:
        position = require_params(params)
        gradient = log_posterior_gradient(updates, position, prior, plan.sampler.num_examples)
        noise = gradient_noise_stddev(plan, state.step)
        new, state = step(state, position, gradient, noise)
        return moves(new, position), state._replace(step=state.step + 1)

    return optax.GradientTransformation(init, update)


def _key(state: KernelState) -> PRNGKeyArray:
    return jax.random.fold_in(state.key, state.step)


def _momentum(key: PRNGKeyArray, position: PyTree) -> PyTree:
    return optax.tree_utils.tree_random_like(key, position, jax.random.normal)


def _largest_noise(plan: Plan) -> float:
    """The largest standard deviation of the privacy noise over the steps of a plan."""
    bound, noise = as_schedule(plan.clip.l2_clip), as_schedule(plan.noise_multiplier)  # type: ignore[union-attr]
    size = as_schedule(plan.sampler.expected_batch_size)
    return plan.sampler.num_examples / size.min * bound.max * noise.max


def _blackjax() -> Any:
    """Imports BlackJAX when it is used."""
    try:
        import blackjax
        import blackjax.sgmcmc.diffusions
        import blackjax.sgmcmc.sgnht
    except ImportError as error:
        raise ImportError(
            "the kernels of dpoptax.vi.sgmcmc need BlackJAX: pip install 'dpoptax[blackjax]'."
        ) from error
    return blackjax
