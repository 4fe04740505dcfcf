"""Weighted sums of gradients over a batch, from factors."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Bool, Float

from dpoptax._precision import widen
from dpoptax.per_example._base import select
from dpoptax.per_example._norm_rules.base import NormRule
from dpoptax.per_example._norm_rules.chunking import sum_examples
from dpoptax.per_example._norm_rules.factors import Factors, narrow_dtype


def sum_weighted(
    rule: NormRule,
    factors: Sequence[Factors],
    weights: Float[Array, " batch"],
    kept: Bool[Array, " batch"],
) -> Array:
    """Returns `sum_i weights_i * gradient_i` of a leaf, over the examples that are kept."""

    def of_chunk(chunk: Any) -> Array:
        factors, weights, kept = chunk
        if len(weights) == 1 and narrow_dtype(factors, rule.spec, integers=True) is not None:
            # 16-bit factors stay as they are: the weight scales their float32 product.
            one = rule.weighted_sum([select_factors(factor, kept) for factor in factors])
            return one * select(kept, weights)[0].astype(one.dtype)
        return rule.weighted_sum([_scale(factor, weights, kept) for factor in factors])

    return sum_examples(
        of_chunk,
        (factors, weights, kept),
        rule.num_terms,
        rule.num_floats,
        side_by_side=rule.sums_to_vector,
    )


def _scale(factors: Factors, weights: Array, kept: Array) -> Factors:
    """Scales the gradients of a site by weights; those not kept become zero."""
    # The gradient is linear in the cotangent, so a scaled cotangent scales the gradient.
    wide = widen(factors.cotangent)
    scales = weights.astype(wide.dtype).reshape(-1, *[1] * (wide.ndim - 1))
    return select_factors(Factors(factors.operands, wide * scales), kept)


def select_factors(factors: Factors, kept: Array) -> Factors:
    """Makes the factors of examples that are not kept zero."""
    # Operands are selected too: NaN in one would survive a cotangent of zero.
    return Factors(
        tuple(select(kept, operand) for operand in factors.operands),
        select(kept, factors.cotangent),
    )
