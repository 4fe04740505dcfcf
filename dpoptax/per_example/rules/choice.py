"""The sites of one leaf in, the cheapest rule for its norms out, by a written cost model.

Shapes are static, so the choice is made once, when the loss is traced.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from dpoptax.per_example.rules import convolution, direct, embedding, matmul
from dpoptax.per_example.rules.factors import Factors
from dpoptax.per_example.tracing import Site

SquaredNorms = Callable[[Sequence[Factors]], Float[Array, " batch"]]
Former = Callable[[Sequence[Factors]], Float[Array, "batch ..."]]

# The most numbers of a leaf whose per-example gradients are held.
FORMED = 2**15


class Rule(NamedTuple):
    """How the norms of a leaf follow from its factors.

    Attributes:
        name: what `explain` shows.
        squared_norms: from the factors of the leaf's sites.
        operations: multiplications per example.
        memory: numbers held per example beyond the factors.
    """

    name: str
    squared_norms: SquaredNorms
    operations: float
    memory: float


def choose_former(sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> Former | None:
    """Returns how to form the gradients of a leaf, if they are better held than their factors.

    They are where they take less memory than the factors, and few enough numbers that writing
    and reading them costs less than forming them twice, for the norms and for the sum.

    Args:
        sites: all uses of one leaf.
        spec: shape and dtype of the leaf.

    Returns:
        A function from the factors to `(batch, *leaf.shape)`, or None.
    """
    held = sum(site.numbers for site in sites)
    if math.prod(spec.shape) > min(held, FORMED):
        return None
    if convolution.understands(sites, spec) and not sites[0].steps:
        return functools.partial(convolution.gradients, sites[0])
    if all(site.primitive.name in {"add", "dot_general"} for site in sites):
        return functools.partial(direct.gradients, sites, spec)
    return None


def choose_rule(sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> Rule:
    """Returns the rule with the fewest operations among those that understand the sites.

    Args:
        sites: all uses of one leaf.
        spec: shape and dtype of the leaf.

    Returns:
        A rule; forming the gradients a few examples at a time serves where nothing else does.
    """
    candidates = [
        Rule(*candidate)
        for module in (matmul, embedding, convolution, direct)
        for candidate in module.candidates(sites, spec)
    ]
    return min(candidates, key=lambda rule: rule.operations)
