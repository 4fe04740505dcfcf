"""Products of rows with the matrix of their group, as of experts: the parameter is the matrices."""

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Array

from dpoptax import _jax_compat
from dpoptax.per_example._grouped_rows import ragged_product
from dpoptax.per_example._primitives.base import HIGHEST, LinearPrimitive
from dpoptax.per_example._tracing.site import Site


def _accepts(eqn: Any) -> bool:
    """Whether it is `jax.lax.ragged_dot`: rows `(rows, k)`, matrices `(groups, k, n)`."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    products = tuple(
        tuple(map(tuple, part)) if part else () for part in numbers.dot_dimension_numbers
    )
    return (
        [len(atom.aval.shape) for atom in eqn.invars] == [2, 3, 1]
        and products == (((1,), (1,)), ((), ()))
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
        and eqn.params["group_offset"] is None
    )


def _run(eqn: Any, values: Sequence[Any]) -> Array:
    rows, weights, sizes = values
    precision, dtype = eqn.params["precision"], eqn.outvars[0].aval.dtype
    return ragged_product(rows, weights, sizes, precision=precision, dtype=dtype)


def _bind_float32(site: Site, parameter: Array, operands: tuple[Array, ...]) -> Array:
    rows, sizes = operands
    return ragged_product(rows, parameter, sizes, precision=HIGHEST, dtype=parameter.dtype)


RAGGED_DOT = LinearPrimitive(
    primitive=_jax_compat.ragged_dot_primitive(),
    saved_operands={1: (0, 2)},
    # The worst case: all rows are of one group.
    num_terms=lambda site: max(1, site.output.shape[0]),
    multiplications=lambda site: math.prod(site.output.shape[:1]) / max(1, site.parameter.shape[0]),
    bind_float32=_bind_float32,
    has_vmap_rule=False,
    index_operands=(1,),
    accepts=_accepts,
    run=_run,
)
