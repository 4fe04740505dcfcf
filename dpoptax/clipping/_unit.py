"""A clip rule in units of its own bound, so that its bound is a number also where it is traced."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpoptax._pytree import PyTree
from dpoptax.clipping._base import ClipRule
from dpoptax.clipping._state import AnyClipRule, StatefulClipRule
from dpoptax.relations import Relation
from dpoptax.schedules import as_schedule


class UnitClip:
    """A rule whose gradients are divided by its bound: its `l2_clip` is the number 1."""

    l2_clip = 1.0

    def __init__(self, rule: ClipRule) -> None:
        self._rule = rule

    def weights(
        self, squared_norms: PyTree[Float[Array, " batch"]], step: Int[Array, ""] | int = 0
    ) -> PyTree[Float[Array, " batch"]]:
        """See `ClipRule.weights`."""
        bound = as_bound(self._rule, step)
        weights = self._rule.weights(squared_norms, step)
        return jax.tree.map(lambda leaf: leaf / bound.astype(leaf.dtype), weights)

    def sensitivity(self, relation: Relation) -> Any:
        """See `ClipRule.sensitivity`."""
        moves = self._rule.sensitivity(relation) / as_bound(self._rule, 0)
        return moves if isinstance(moves, jax.core.Tracer) else float(moves)


def first_rule(rule: AnyClipRule) -> ClipRule:
    """Returns the rule of the first step, in units of its bound; one without state as it is."""
    if not isinstance(rule, StatefulClipRule):
        return rule
    # Also in a function that is being traced.
    with jax.ensure_compile_time_eval():
        return UnitClip(rule.at(rule.init()))


def as_bound(rule: ClipRule, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """Returns the `l2_clip` of a rule as an array, also if it is traced."""
    bound: Any = rule.l2_clip
    return jnp.asarray(bound if isinstance(bound, jax.Array) else as_schedule(bound).at(step))
