"""A private gradient estimator for loops that are written for BlackJAX."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.accounting import Ledger
from dpoptax.training import PrivateRun
from dpoptax.training._noise_binding import bind_noise
from dpoptax.vi._elbo_terms import Prior, checked_prior
from dpoptax.vi.sgmcmc._log_density import (
    check_plan,
    gradient_noise_stddev,
    log_posterior_gradient,
    negative,
)


class _Held(NamedTuple):
    """The last private gradient."""

    released_gradient: PyTree


class GradEstimator:
    """A private `grad_estimator(position, minibatch)` for `blackjax.sgld` and others.

    Each call draws a batch by the sampler of the plan, charges the ledger, and releases the
    gradient of the log posterior with new noise. It draws the batch itself and ignores
    `minibatch`, so that no batch is used twice. It counts its calls and refuses more than planned.

    A call inside a compiled function would be counted once and run many times, so it is refused.
    `blackjax.sghmc` compiles its inner loop: use `dpoptax.vi.sgmcmc.SGHMC` in its place.

    BlackJAX adds its own noise on top. `noise_stddev` is what the gradient has already: pass
    `temperature=max(0, 1 - step_size * noise_stddev**2 / 2)` to `sgld.step`, as `SGLD` does.

    Example:
        >>> import dpoptax, jax, jax.numpy as jnp
        >>> plan = dpoptax.Plan.calibrate(
        ...     num_examples=200, expected_batch_size=200, clip=2.0, num_steps=30, epsilon=4.0,
        ...     delta=1e-3,
        ... )
        >>> estimator = GradEstimator(
        ...     lambda mean, x: -0.5 * (x - mean) ** 2, 10.0, jnp.array(0.0), jnp.ones(200),
        ...     plan=plan,
        ... )
        >>> gradient = estimator(jnp.array(0.5), None)
        >>> estimator.ledger.num_steps
        1

    With BlackJAX:

    .. code::

        sgld = blackjax.sgld(estimator)
        position = sgld.step(key, position, None, step_size, temperature)

    Reference: Wang, Fienberg and Smola 2015, arXiv:1502.07645.
    """

    def __init__(
        self,
        log_likelihood: Callable[[PyTree, PyTree], Float[Array, ""]],
        prior: Prior,
        position: PyTree,
        data: PyTree,
        *,
        plan: Plan,
        key: PRNGKeyArray | None = None,
    ) -> None:
        """Checks the arguments.

        Args:
            log_likelihood: `log_likelihood(position, example)`, of one example.
            prior: `prior(position)`, the log density; or a number, the scale of a normal prior.
            position: of the shapes that the chain has; its values do not matter.
            data: a tree of arrays with a leading axis of `plan.sampler.num_examples`.
            plan: as in `sample`.
            key: as in `dpoptax.training.fit`; a new secret key by default.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: a number is out of range.
        """
        check_plan(plan)
        self._plan, self._prior = plan, checked_prior(prior)
        loss = negative(log_likelihood, prior)
        self._run = _Run(loss, position, data, plan=plan, optimizer=_hold(), key=key)

    @property
    def ledger(self) -> Ledger:
        """What the calls so far cost."""
        return self._run.ledger

    @property
    def noise_stddev(self) -> float:
        """The standard deviation of the privacy noise in the next gradient."""
        return float(gradient_noise_stddev(self._plan, self._run.steps_done))

    def __call__(self, position: PyTree, minibatch: Any = None) -> PyTree:
        """Releases the gradient of the log posterior at a position, with new noise.

        Args:
            position: where the gradient is taken.
            minibatch: ignored; the sampler of the plan draws the batch.

        Returns:
            A tree like the position.

        Raises:
            ValueError: all planned steps were made, or the position is traced.
        """
        del minibatch
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(position)):
            raise ValueError(
                "each call is charged when it happens, and a compiled function may run more often "
                "than it is traced; got a traced position. Call the kernel outside of jax.jit. For "
                "blackjax.sghmc, which compiles its inner loop, use dpoptax.vi.sgmcmc.SGHMC."
            )
        self._run.step_at(position)
        held = optax.tree_utils.tree_get(self._run.state.opt_state, "released_gradient")
        return log_posterior_gradient(held, position, self._prior, self._plan.sampler.num_examples)


class _Run(PrivateRun):
    """A run whose next gradient is taken where the caller says."""

    def step_at(self, position: PyTree) -> None:
        """Makes a step at a position, with noise that is bound to it."""
        state = self._state
        here = jax.tree.map(_like, position, state.params)
        # Under one key, a gradient elsewhere must not have the same noise: the difference of both
        # would be exact. The step itself binds the noise to the likelihood and the batch.
        opt_state = bind_noise(state.opt_state, here, program="position")
        self._state = state._replace(params=here, opt_state=opt_state)
        self.step()


def _like(value: Any, expected: Array) -> Array:
    """Returns a value as an array of the shape and dtype that the chain began with."""
    if jnp.shape(value) != expected.shape:
        raise ValueError(
            f"position must have the shapes of the position that the estimator was made with; got "
            f"{jnp.shape(value)} in place of {expected.shape}."
        )
    return jnp.asarray(value, expected.dtype)


def _hold() -> optax.GradientTransformation:
    """Keeps the private gradient in its state, and moves nothing."""

    def update(updates: PyTree, state: _Held, params: Any = None) -> tuple[PyTree, _Held]:
        del state, params
        return jax.tree.map(jnp.zeros_like, updates), _Held(updates)

    return optax.GradientTransformation(
        lambda params: _Held(jax.tree.map(jnp.zeros_like, params)), update
    )
