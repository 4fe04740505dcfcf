"""Elementwise products: the parameter is a scale, such as that of a normalization.

Input and cotangent of a scale are larger than its gradient by the number of positions that share
it. So the gradient of an example is summed where it arises, and the sum is kept.
"""

import math

import jax

from dpoptax.per_example._primitives.base import LinearPrimitive
from dpoptax.per_example._tracing.site import Site


def _num_terms(site: Site) -> int:
    return max(1, math.prod(site.output.shape) // max(1, math.prod(site.parameter.shape)))


def _multiplications(site: Site) -> float:
    return math.prod(site.output.shape) / max(1, math.prod(site.parameter.shape))


MUL = LinearPrimitive(
    primitive=jax.lax.mul_p,
    saved_operands={0: (1,), 1: (0,)},
    num_terms=_num_terms,
    multiplications=_multiplications,
    sums_early=True,
)
