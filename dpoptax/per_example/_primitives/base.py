"""Linear primitive: a JAX operation that is linear in one of its operands, the parameter."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jaxtyping import Array

from dpoptax.per_example._tracing.concatenated import Box, Window
from dpoptax.per_example._tracing.site import Site

# From an equation, the parameter's position and its window to the windows of the saved operands
# and the window of the output.
Windows: TypeAlias = Callable[[Any, int, Box], tuple[tuple[Window, ...], Window]]

HIGHEST = jax.lax.Precision.HIGHEST


def bind_at_highest_precision(site: Site, parameter: Array, operands: tuple[Array, ...]) -> Array:
    """Runs the equation of a site on float32 values, without its own lower precision."""
    params = dict(site.params)
    if "precision" in params:
        params["precision"] = (HIGHEST, HIGHEST)
    if "preferred_element_type" in params:
        params["preferred_element_type"] = None
    values = list(operands)
    values.insert(site.position, parameter)
    return site.primitive.bind(*values, **params)


@dataclasses.dataclass(frozen=True)
class LinearPrimitive:
    """What per-example gradients need to know about one JAX primitive.

    Attributes:
        primitive: the JAX primitive.
        saved_operands: by position of the parameter, the positions of the other operands that the
            derivative with respect to the parameter needs.
        num_terms: how many terms one entry of the parameter's gradient adds up at most, when the
            equation runs once.
        multiplications: how many multiplications one entry of the parameter's gradient takes on
            average, when the equation runs once.
        windows: which windows of the saved operands and of the output belong to a window of a
            concatenated parameter. None if unknown: such parameters are then materialized.
        bind_float32: runs the equation of a site in float32, at the highest precision.
        index_operands: which of the saved operands are positions, not numbers to multiply.
        sums_early: whether factors are larger than the gradient of the parameter, which is then
            summed where it arises. For products of numbers only, see `_tracing/early_sums.py`.
        spreads_nan: whether XLA, under `vmap`, lets NaN in one example's gradient reach others.
        accepts: whether an equation of the primitive is of a kind that this entry is for.
        run: runs such an equation where JAX's own way is slow, or has no rule for `vmap`; None if
            it serves.
        has_vmap_rule: whether `vmap` works on the equation as it is.
    """

    primitive: Any
    saved_operands: Mapping[int, tuple[int, ...]]
    num_terms: Callable[[Site], int]
    multiplications: Callable[[Site], float]
    windows: Windows | None = None
    bind_float32: Callable[[Site, Array, tuple[Array, ...]], Array] = bind_at_highest_precision
    index_operands: tuple[int, ...] = ()
    sums_early: bool = False
    spreads_nan: bool = False
    accepts: Callable[[Any], bool] = lambda eqn: True
    run: Callable[[Any, Sequence[Any]], Array] | None = None
    has_vmap_rule: bool = True

    @property
    def positions(self) -> tuple[int, ...]:
        """The operand positions at which the primitive may take a parameter."""
        return tuple(self.saved_operands)
