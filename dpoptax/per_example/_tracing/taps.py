"""Taps: extra inputs of a loss, so that one backward pass gives the cotangents of equations.

`tap(output, zeros)` is `output`, and the derivative with respect to `zeros` is the cotangent.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpoptax import _jax_compat
from dpoptax.per_example._tracing.site import EqnPath

# By the path of the equation whose output is tapped.
Taps: TypeAlias = dict[EqnPath, Any]
# By site, the operands that its gradient needs.
Saved: TypeAlias = dict[EqnPath, tuple[Any, ...]]


def batched_like(output: Array, zeros: Array) -> Array:
    """Returns `output`; under `vmap` it gets the batch axis of `zeros`.

    An output that is the same for all examples would have one cotangent for all of them: the sum
    over the batch. XLA removes the selection.
    """
    return jnp.where(jnp.zeros((), bool), jnp.sum(zeros).astype(output.dtype), output)


@jax.custom_vjp
def tap(output: Array, tap: Array) -> Array:
    """Returns `output`. The derivative with respect to `tap` is the cotangent of `output`."""
    return batched_like(output, tap)


tap.defvjp(
    lambda output, tap: (batched_like(output, tap), None),
    lambda _, cotangent: (cotangent, cotangent),
)


def following_additions(jaxpr: Any) -> dict[int, int]:
    """Maps an equation to the last of the additions that follow it and keep its cotangent.

    An addition of equal shapes has the cotangent of its inputs. If it is the only user of an
    output, then one tap after the addition serves both equations.
    """
    users: dict[Any, list[int]] = {}
    for number, eqn in enumerate(jaxpr.eqns):
        for atom in eqn.invars:
            if not _jax_compat.is_literal(atom):
                users.setdefault(atom, []).append(number)
    # An output of the jaxpr has a user outside, so no addition inside is its only one.
    for atom in jaxpr.outvars:
        if not _jax_compat.is_literal(atom):
            users.setdefault(atom, []).append(-1)
    last: dict[int, int] = {}
    # Backwards, so that a chain of additions is followed to its end.
    for number, eqn in reversed(list(enumerate(jaxpr.eqns))):
        using = users.get(eqn.outvars[0], []) if len(eqn.outvars) == 1 else []
        if len(using) == 1 and using[0] >= 0:
            user = jaxpr.eqns[using[0]]
            if user.primitive is jax.lax.add_p and _same(eqn.outvars[0], user.outvars[0]):
                last[number] = last.get(using[0], using[0])
    return last


def _same(one: Any, other: Any) -> bool:
    return (one.aval.shape, one.aval.dtype) == (other.aval.shape, other.aval.dtype)
