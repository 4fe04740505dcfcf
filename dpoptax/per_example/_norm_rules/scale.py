"""Elementwise scales: the gradient of an example is the sum of input times cotangent.

The sum is over the positions that share a number of the scale. It is formed first, so that only
`batch x scale` numbers remain.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax._precision import wide_dtype
from dpoptax.per_example._norm_rules.base import NormRule
from dpoptax.per_example._norm_rules.factors import Factors, to_leaf
from dpoptax.per_example._norm_rules.rounding import round_up, sum_of_squares
from dpoptax.per_example._tracing.site import Site


@dataclasses.dataclass(frozen=True, eq=False)
class ElementwiseScale(NormRule):
    """Sums the products over positions before anything else."""

    name = "scale"

    @classmethod
    def matches(
        cls, sites: Sequence[Site], spec: jax.ShapeDtypeStruct
    ) -> "ElementwiseScale | None":
        """Accepts one run of one elementwise product."""
        if len(sites) != 1 or sites[0].scans or sites[0].output_window is not None:
            return None
        (site,) = sites
        if site.primitive is not jax.lax.mul_p or not site.preserves_norms(spec):
            return None
        return cls(tuple(sites), spec)

    @property
    def cost(self) -> float:
        """See `NormRule.cost`."""
        return float(math.prod(self.sites[0].output.shape))

    @property
    def num_terms(self) -> int:
        """See `NormRule.num_terms`: after `prepare`, an example adds one number."""
        return 1

    @property
    def num_floats(self) -> int:
        """See `NormRule.num_floats`: after `prepare`, there is only the gradient."""
        return math.prod(self.spec.shape)

    def prepare(self, factors: Sequence[Factors]) -> Sequence[Factors]:
        """Returns the gradients as cotangents, and for each the sum of its squared terms."""
        (site,), ((operand,), cotangent) = self.sites, factors[0]
        dtype = wide_dtype(self.spec.dtype)
        output, shape = site.output.shape, site.parameter.shape
        # A scalar may meet an array without a broadcast.
        inputs = operand.reshape(len(operand), *(operand.shape[1:] or [1] * len(output)))
        terms = inputs.astype(dtype) * cotangent.astype(dtype)
        sizes = sum_of_squares(terms, tuple(range(1, terms.ndim)))
        shared = [i for i, n in enumerate(output) if n != (shape or [1] * len(output))[i]]
        sums = jnp.sum(terms, axis=tuple(1 + i for i in shared), keepdims=True)
        return [Factors((sizes,), sums.reshape(len(sums), *shape))]

    def squared_norms(self, factors: Sequence[Factors]) -> Float[Array, " batch"]:
        """See `NormRule.squared_norms`."""
        ((sizes,), sums) = factors[0]
        squares = jnp.sum(jnp.square(sums), axis=tuple(range(1, sums.ndim)))
        return round_up(squares, sizes, super().num_terms)

    def gradients(self, factors: Sequence[Factors]) -> Float[Array, "batch ..."]:
        """See `NormRule.gradients`."""
        return jax.vmap(lambda leaf: to_leaf(self.sites[0], leaf, self.spec))(factors[0].cotangent)

    def weighted_sum(self, factors: Sequence[Factors]) -> Float[Array, "..."]:
        """See `NormRule.weighted_sum`."""
        return to_leaf(self.sites[0], jnp.sum(factors[0].cotangent, axis=0), self.spec)
