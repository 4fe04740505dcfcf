"""What a rule is: the ways from the factors of one leaf to norms, gradients and sums."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxtyping import Array, Float

from dpoptax.per_example._norm_rules.factors import Factors


class NormRule(NamedTuple):
    """How norms, gradients and sums of a leaf follow from the factors of its sites.

    Attributes:
        name: what `explain` shows.
        squared_norms: one number per example.
        gradients: the gradient of every example, in float32 or wider.
        weighted_sum: their sum, in float32 or wider, in one large product where there is one.
        operations: multiplications per example for the norms.
        memory: numbers per example, beyond the factors, while the norms are computed.
    """

    name: str
    squared_norms: Callable[[Sequence[Factors]], Float[Array, " batch"]]
    gradients: Callable[[Sequence[Factors]], Float[Array, "batch ..."]]
    weighted_sum: Callable[[Sequence[Factors]], Float[Array, "..."]]
    operations: float
    memory: float
