"""The sites of one leaf in, the cheapest rule for it out, by a written cost model.

Shapes are static, so the choice is made once, when the loss is traced.
"""

import math
from collections.abc import Sequence

import jax

from dpoptax.per_example._norm_rules import (
    convolution,
    embedding,
    materialize,
    matmul,
    tied_embedding,
)
from dpoptax.per_example._norm_rules.base import NormRule
from dpoptax.per_example._tracing.site import Site

# Per-example gradients of one leaf are held if they are fewer numbers, over the batch.
FORMED = 2**23
# And if they are not many times the factors.
WORTH = 4


def choose_rule(sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> NormRule:
    """Returns the rule with the fewest operations among those that understand the sites.

    Args:
        sites: all uses of one leaf.
        spec: shape and dtype of the leaf.

    Returns:
        A rule; forming the gradients a few examples at a time serves where nothing else does.
    """
    candidates = [
        rule
        for module in (matmul, embedding, tied_embedding, convolution, materialize)
        for rule in module.candidates(sites, spec)
    ]
    return min(candidates, key=lambda rule: rule.operations)


def is_materialized(
    rule: NormRule, sites: Sequence[Site], spec: jax.ShapeDtypeStruct, batch: int
) -> bool:
    """Whether the gradients of a leaf are better held than their factors.

    They are where they are few enough numbers that writing and reading them costs less than
    forming them twice, for the norms and for the sum; and where the norms cost more than that.

    Args:
        rule: of the leaf.
        sites: all uses of the leaf.
        spec: shape and dtype of the leaf.
        batch: the number of examples.

    Returns:
        True to form them once.
    """
    size = math.prod(spec.shape)
    held = sum(site.num_floats for site in sites)
    return size <= WORTH * held and size * batch < FORMED and size * 2 < rule.operations
