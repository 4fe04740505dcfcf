"""Weighted sums of gradients over a batch, from factors."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Bool, Float

from dpoptax._precision import widen
from dpoptax.per_example._base import select
from dpoptax.per_example._norm_rules.base import NormRule
from dpoptax.per_example._norm_rules.chunking import sum_examples
from dpoptax.per_example._norm_rules.factors import Factors


def sum_weighted(
    rule: NormRule,
    factors: Sequence[Factors],
    weights: Float[Array, " batch"],
    kept: Bool[Array, " batch"],
) -> Array:
    """Returns `sum_i weights_i * gradient_i` of a leaf, over the examples that are kept."""

    def of_chunk(chunk: Any) -> Array:
        factors, weights, kept = chunk
        return rule.weighted_sum([_scale(factor, weights, kept) for factor in factors])

    return sum_examples(of_chunk, (factors, weights, kept), rule.num_terms, rule.num_floats)


def _scale(factors: Factors, weights: Array, kept: Array) -> Factors:
    """Scales the gradients of a site by weights; those not kept become zero."""
    # The gradient is linear in the cotangent, so a scaled cotangent scales the gradient. Operands
    # are selected too: NaN in one would survive a cotangent of zero.
    wide = widen(factors.cotangent)
    scales = weights.astype(wide.dtype).reshape(-1, *[1] * (wide.ndim - 1))
    operands = tuple(select(kept, operand) for operand in factors.operands)
    return Factors(operands, select(kept, wide * scales))
