"""Matrix products: the parameter is either factor."""

import math
from typing import Any

import jax

from dpoptax.per_example._primitives.base import LinearPrimitive
from dpoptax.per_example._tracing.concatenated import Box, Window
from dpoptax.per_example._tracing.site import Site


def _outputs_of_one_row(site: Site) -> int:
    """Output entries of one product of a row with the parameter."""
    contracting, _ = site.params["dimension_numbers"]
    contracted = contracting[site.position]
    return math.prod(n for i, n in enumerate(site.parameter.shape) if i not in contracted)


def _num_terms(site: Site) -> int:
    return max(1, math.prod(site.output.shape) // max(1, _outputs_of_one_row(site)))


def _multiplications(site: Site) -> float:
    return math.prod(site.output.shape) / max(1, _outputs_of_one_row(site))


def _windows(eqn: Any, position: int, window: Box) -> tuple[tuple[Window, ...], Window]:
    contracting, batch = eqn.params["dimension_numbers"]
    own, other = position, 1 - position
    operand = [(0, size) for size in eqn.invars[other].aval.shape]
    output = [(0, size) for size in eqn.outvars[0].aval.shape]
    # A contracted or batch axis has the same window in both operands.
    shared = (*contracting[own], *batch[own])
    for axis, facing in zip(shared, (*contracting[other], *batch[other]), strict=True):
        operand[facing] = window[axis]
    # The output has the batch axes first, then the free axes of the left and the right operand.
    output[: len(batch[own])] = [window[axis] for axis in batch[own]]
    free = [axis for axis in range(len(window)) if axis not in shared]
    first = len(batch[own]) if own == 0 else len(output) - len(free)
    output[first : first + len(free)] = [window[axis] for axis in free]
    return (tuple(operand),), tuple(output)


DOT_GENERAL = LinearPrimitive(
    primitive=jax.lax.dot_general_p,
    saved_operands={0: (1,), 1: (0,)},
    num_terms=_num_terms,
    multiplications=_multiplications,
    windows=_windows,
)
