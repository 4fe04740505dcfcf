"""The sites of one leaf in, the cheapest rule for its norms out, by a written cost model.

Shapes are static, so the choice is made once, when the loss is traced.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from dpoptax.per_example.rules import convolution, direct, embedding, matmul
from dpoptax.per_example.rules.factors import Factors
from dpoptax.per_example.tracing import Site

SquaredNorms = Callable[[Sequence[Factors]], Float[Array, " batch"]]


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
