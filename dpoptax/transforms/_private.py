"""Transformations that know their noise, and optimizers that act before the clip.

Some optimizers need more than the released gradient. DP-AdamBC needs the standard deviation of its
noise, scale-then-privatize scales gradients before the clip, and DiSK takes them at another point.
Two subclasses of Optax's transformation carry this. `chain` reads it, and so does `fit`.
"""

import math
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.clipping import ClipRule
from dpoptax.mechanisms._base import noise_stddev
from dpoptax.schedules import ScalarOrSchedule, as_schedule

# `(state, params) -> ` a number, an array, or a tree prefix of the parameters.
NoiseStddev: TypeAlias = Callable[[Any, PyTree], PyTree]
GradientPoint: TypeAlias = Callable[[PyTree, Any], PyTree]


class PrivateTransformation(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
    """A private transformation that knows its noise, and where its gradients are taken.

    Attributes:
        noise_stddev: `noise_stddev(state, params)` returns the standard deviation of the noise in
            each coordinate of the release that `update` makes from this state: the noise of the
            mean, in the unit of the gradient. It is a number or an array, or a tree prefix of
            these. None if it is not known.
        gradient_point: `gradient_point(params, state)` returns the parameters at which the
            gradients of the next step are taken. None if that is `params`.
    """

    noise_stddev: NoiseStddev | None
    gradient_point: GradientPoint | None

    def __new__(
        cls,
        init: Callable[..., Any],
        update: Callable[..., Any],
        *,
        noise_stddev: NoiseStddev | None = None,
        gradient_point: GradientPoint | None = None,
    ) -> "PrivateTransformation":
        """Makes the pair of functions that Optax knows, with two attributes."""
        made = super().__new__(cls, init, update)
        made.noise_stddev, made.gradient_point = noise_stddev, gradient_point
        return made


class PrivateOptimizer(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
    """An optimizer that changes what happens before the clip: `chain` wraps `privatize` in it.

    Attributes:
        wrap: returns the private transformation to use in place of the one that it gets.
        optimizer: follows that transformation.
    """

    wrap: Callable[[PrivateTransformation], PrivateTransformation]
    optimizer: optax.GradientTransformation

    def __new__(
        cls,
        name: str,
        optimizer: optax.GradientTransformation,
        wrap: Callable[[PrivateTransformation], PrivateTransformation],
    ) -> "PrivateOptimizer":
        """Makes an optimizer that `chain` understands, and that refuses to run without it."""

        def refuse(*arguments: Any, **options: Any) -> NoReturn:
            del arguments, options
            raise ValueError(
                f"{name} acts before the clip, so it must be outermost; got it inside another "
                "transformation, such as optax.chain, which cannot do that. Put the others inside: "
                f"{name}(optax.chain(...)). In a loop of your own use "
                f"dpoptax.transforms.chain(privatize(...), {name}(...))."
            )

        made = super().__new__(cls, optimizer.init, refuse)
        made.wrap, made.optimizer = wrap, optimizer
        return made


def bind(
    private: optax.GradientTransformation, optimizer: optax.GradientTransformation
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Returns the private transformation wrapped as the optimizer asks, and what follows it."""
    while isinstance(optimizer, PrivateOptimizer):
        if not isinstance(private, PrivateTransformation):
            raise TypeError(
                "an optimizer that acts before the clip needs dpoptax.privatize(...) or "
                f"plan.privatize(key); got a {type(private).__name__}. Pass privatize unchanged."
            )
        private, optimizer = optimizer.wrap(private), optimizer.optimizer
    return private, optimizer


def released_noise_stddev(
    clip: ClipRule,
    noise_multiplier: ScalarOrSchedule,
    expected_batch_size: ScalarOrSchedule,
    step: Int[Array, ""] | int,
) -> float | Float[Array, ""]:
    """Returns the standard deviation of the noise in each coordinate of the released mean.

    It is noise_multiplier * l2_clip / expected_batch_size, each at this step.
    """
    return noise_stddev(clip, noise_multiplier, step) / as_schedule(expected_batch_size).at(step)


def stddev_of(private: optax.GradientTransformation, state: Any, params: PyTree) -> PyTree | None:
    """Returns `private.noise_stddev(state, params)`, or None if it is not known."""
    known = getattr(private, "noise_stddev", None)
    return None if known is None else known(state, params)


def takes_gradients_at_params(tx: optax.GradientTransformation) -> bool:
    """Whether the gradients for `tx` are taken at the parameters, and not elsewhere."""
    return getattr(tx, "gradient_point", None) is None


def gradient_point(
    tx: optax.GradientTransformation, params: PyTree, opt_state: optax.OptState
) -> PyTree:
    """Returns where the gradients for `tx` are taken: at `params`, unless it says otherwise."""
    moved = getattr(tx, "gradient_point", None)
    return params if moved is None else moved(params, opt_state)


def require_params(params: Any) -> PyTree:
    """Returns the parameters of an update; refuses None, Optax's default."""
    if params is None:
        raise ValueError(
            "this update depends on the parameters; got None: call tx.update(grads, state, params)."
        )
    return params


def checked_decay(name: str, value: float) -> float:
    """Returns the decay of an exponential average; refuses numbers outside of [0, 1)."""
    decay = _validate.real(name, value)
    if not 0 <= decay < 1:
        raise ValueError(
            f"{name} must be at least 0 and below 1; got {decay}. Pass for example .9."
        )
    return decay


def one_minus_power(decay: float, count: Float[Array, ""]) -> Float[Array, ""]:
    """Returns 1 - decay**count, also for a decay that is close to 1 and rounds to it."""
    # The logarithm in double precision: float32 has three digits of 1 - 0.9999.
    return -jnp.expm1(count * math.log(decay)) if decay else jnp.ones_like(count)
