"""Bounds on norms: which are valid, the weights that keep them, and the sensitivity of a sum."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.per_example._base import global_squared_norms
from dpoptax.relations import Relation, parse_relation
from dpoptax.schedules import ScalarOrSchedule, as_schedule

# Squares below about 1e-38 underflow in float32, so norms below about 1e-19 would read as zero. The
# margin keeps the terms of a norm at the bound well above that.
SMALLEST_CLIP = 1e-12
# A weight of at most LARGEST_CLIP / SMALLEST_CLIP does not overflow float32.
LARGEST_CLIP = 1e18


def clip_bound(name: str, value: Any) -> float:
    """Returns a bound on a norm as a float; infinity is one that does not clip."""
    bound = _validate.real(name, value)
    if bound <= 0:
        raise ValueError(
            f"{name} bounds a norm and must be positive; got {bound}. Pass a number above 0."
        )
    if bound < SMALLEST_CLIP:
        raise ValueError(
            f"{name} must be at least {SMALLEST_CLIP}: float32 squares vanish below; "
            f"got {bound}. Scale the loss up instead."
        )
    return bound


def scaling_bound(name: str, value: Any) -> float:
    """Returns a bound on a norm as a float, for a rule that also scales gradients up to it."""
    bound = clip_bound(name, value)
    if bound > LARGEST_CLIP:
        raise ValueError(
            f"{name} must be at most {LARGEST_CLIP:g}, because this rule scales small gradients up "
            f"to it; got {bound}. Pass 1.0, or dpoptax.clipping.FlatClip(math.inf) to train "
            "without clipping."
        )
    return bound


def stability(name: str, value: Any) -> float:
    """Returns the constant that keeps a weight finite at norms near zero."""
    constant = _validate.real(name, value)
    if not SMALLEST_CLIP <= constant <= LARGEST_CLIP:
        raise ValueError(
            f"{name} must lie between {SMALLEST_CLIP} and {LARGEST_CLIP:g}, in the unit of the "
            f"gradient; got {constant}. Leave it out for the default."
        )
    return constant


def norms_and_finite(
    squared_norms: PyTree[Float[Array, " batch"]],
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """Returns the norms of the whole gradients, and which of them are finite."""
    norms = jnp.sqrt(global_squared_norms(squared_norms))
    # Ask the norms, not their squares: XLA keeps a root for its consumers, but repeats the sum over
    # all parameters below it in each of them. With 37 parameters, that doubled the program.
    return norms, jnp.isfinite(norms)


def weight_within(
    bound: float | Float[Array, ""], norms: Float[Array, " batch"], finite: Bool[Array, " batch"]
) -> Float[Array, " batch"]:
    """Returns min(1, bound / norm), and 0 where not finite."""
    # A norm of zero gives inf here, and min(1, inf) is 1: nothing to clip.
    return jnp.where(finite, jnp.minimum(1.0, bound / norms), 0.0)


def sensitivity_of(l2_clip: ScalarOrSchedule, relation: Relation) -> float:
    """Returns the sensitivity of a sum in which each example adds a vector of norm <= l2_clip.

    An example that joins, leaves, or gives way to nothing moves the sum by its own vector. An
    example that replaces another one moves it by the difference of two vectors, which may point in
    opposite directions.
    """
    largest = as_schedule(l2_clip).max
    return 2 * largest if parse_relation(relation).name == "REPLACE_ONE" else largest
