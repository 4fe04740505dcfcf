"""Lookups: the parameter is the table."""

import math

import jax

from dpoptax.per_example._primitives.base import LinearPrimitive
from dpoptax.per_example._tracing.site import Site


def _num_terms(site: Site) -> int:
    # The worst case: every index is the same.
    return max(1, math.prod(site.output.shape) // max(1, math.prod(site.params["slice_sizes"])))


def _multiplications(site: Site) -> float:
    return math.prod(site.output.shape) / max(1, math.prod(site.parameter.shape))


GATHER = LinearPrimitive(
    primitive=jax.lax.gather_p,
    saved_operands={0: (1,)},
    num_terms=_num_terms,
    multiplications=_multiplications,
    index_operands=(0,),
)
