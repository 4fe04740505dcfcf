"""Matrix products: the gradient of an example is A'G, for inputs A (T, K) and cotangents G (T, N).

    outer:  ||A'G||^2 = ||a||^2 ||g||^2   for T = 1           (Goodfellow 2015, arXiv:1510.01799)
    direct: ||A'G||^2 from A'G itself     K N T multiplications
    Gram:   ||A'G||^2 = <A A', G G'>      (K + N) T^2 multiplications
                                                              (Li et al. 2022, arXiv:2110.05679)

Batch dimensions of the weight, and scans that slice it, give H independent products: their norms
add. Scans that share the weight, and further uses of it, make T longer.
"""

import abc
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax._precision import wide_dtype
from dpoptax.per_example._norm_rules.base import NormRule
from dpoptax.per_example._norm_rules.chunking import map_chunks
from dpoptax.per_example._norm_rules.cost_model import constants
from dpoptax.per_example._norm_rules.factors import HIGHEST, Factors
from dpoptax.per_example._norm_rules.matmul_layout import (
    Pair,
    Sizes,
    join_pairs,
    orientation,
    product_to_leaf,
    sizes_of,
)
from dpoptax.per_example._norm_rules.rounding import round_up, sum_of_squares
from dpoptax.per_example._tracing.site import Site


@dataclasses.dataclass(frozen=True, eq=False)
class MatmulRule(NormRule):
    """What the three rules for matrix products share.

    Attributes:
        sizes: of one example's products, with T added up over the uses.
    """

    sizes: Sizes

    @classmethod
    def matches(cls, sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> "MatmulRule | None":
        """Accepts a leaf that is used in products of one orientation only."""
        if any(site.primitive is not jax.lax.dot_general_p for site in sites):
            return None
        if not all(site.preserves_norms(spec) for site in sites):
            return None
        if len({orientation(site) for site in sites}) > 1:
            return None
        sizes = sizes_of(sites[0])._replace(t=sum(sizes_of(site).t for site in sites))
        return cls(tuple(sites), spec, sizes) if cls.applies(sizes) else None

    @property
    def num_terms(self) -> int:
        """See `NormRule.num_terms`."""
        return self.sizes.t

    @staticmethod
    @abc.abstractmethod
    def applies(sizes: Sizes) -> bool:
        """Whether the rule serves products of these sizes."""

    @property
    @abc.abstractmethod
    def floats_of_norms(self) -> int:
        """How many floats `pair_norms` needs for one example."""

    @abc.abstractmethod
    def pair_norms(self, pair: Pair) -> Float[Array, " batch"]:
        """The squared norms from all uses, joined into one pair."""

    def squared_norms(self, factors: Sequence[Factors]) -> Float[Array, " batch"]:
        """See `NormRule.squared_norms`."""
        # Chunks of the factors as they are: only a chunk at a time is cast to float32.
        return map_chunks(
            lambda chunk: self.pair_norms(join_pairs(self.sites, chunk, self.spec)),
            list(factors),
            self.floats_of_norms,
        )

    def gradients(self, factors: Sequence[Factors]) -> Float[Array, "batch ..."]:
        """See `NormRule.gradients`."""
        products = multiply(join_pairs(self.sites, factors, self.spec))
        return jax.vmap(lambda product: product_to_leaf(self.sites[0], product, self.spec))(
            products
        )

    def weighted_sum(self, factors: Sequence[Factors]) -> Float[Array, "..."]:
        """See `NormRule.weighted_sum`."""
        # The batch becomes a part of T: (1, H, batch * T, K) by (1, H, batch * T, N).
        a, g = (leaf.swapaxes(0, 1) for leaf in join_pairs(self.sites, factors, self.spec))
        joined = Pair(*(leaf.reshape(1, len(leaf), -1, leaf.shape[-1]) for leaf in (a, g)))
        return product_to_leaf(self.sites[0], multiply(joined)[0], self.spec)


@dataclasses.dataclass(frozen=True, eq=False)
class OuterProduct(MatmulRule):
    """The norm of an outer product is the product of the norms (T = 1)."""

    name = "outer"

    @staticmethod
    def applies(sizes: Sizes) -> bool:
        """See `MatmulRule.applies`."""
        return sizes.t == 1

    @property
    def cost(self) -> float:
        """See `NormRule.cost`."""
        h, _, k, n = self.sizes
        return h * (k + n)

    @property
    def sums_to_vector(self) -> bool:
        """See `NormRule.sums_to_vector`."""
        return self.sizes.h == 1 and min(self.sizes.k, self.sizes.n) == 1

    @property
    def floats_of_norms(self) -> int:
        """See `MatmulRule.floats_of_norms`; XLA fuses all of it into one pass."""
        return 1

    def pair_norms(self, pair: Pair) -> Float[Array, " batch"]:
        """See `MatmulRule.pair_norms`."""
        batch, h = pair.a.shape[:2]

        def squares(leaf: Array) -> Array:
            return sum_of_squares(leaf.reshape(batch * h, leaf.shape[2] * leaf.shape[3]), (1,))

        return jnp.sum((squares(pair.a) * squares(pair.g)).reshape(batch, h), axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class DirectMatmul(MatmulRule):
    """Multiplies A'G, a few examples at a time, squares it and drops it."""

    name = "direct"

    @staticmethod
    def applies(sizes: Sizes) -> bool:
        """See `MatmulRule.applies`."""
        return sizes.t != 1

    @property
    def cost(self) -> float:
        """See `NormRule.cost`."""
        h, t, k, n = self.sizes
        return h * t * k * n + constants(self.sites).product * h * k * n

    @property
    def floats_of_norms(self) -> int:
        """See `MatmulRule.floats_of_norms`."""
        h, t, k, n = self.sizes
        return h * (k * n + t * (k + n))

    def pair_norms(self, pair: Pair) -> Float[Array, " batch"]:
        """See `MatmulRule.pair_norms`."""
        terms = sum_of_squares(pair.a, (3,)) * sum_of_squares(pair.g, (3,))
        products = jnp.sum(jnp.square(multiply(pair)), axis=(1, 2, 3))
        return round_up(products, jnp.sum(terms, axis=(1, 2)), self.sizes.t)


@dataclasses.dataclass(frozen=True, eq=False)
class GramMatmul(MatmulRule):
    """Multiplies the two Gram matrices (T, T) instead of A'G: cheaper for short sequences."""

    name = "Gram"

    @staticmethod
    def applies(sizes: Sizes) -> bool:
        """See `MatmulRule.applies`."""
        return sizes.t != 1

    @property
    def cost(self) -> float:
        """See `NormRule.cost`."""
        h, t, k, n = self.sizes
        return h * t * t * (k + n) + constants(self.sites).gram * h * t * t

    @property
    def floats_of_norms(self) -> int:
        """See `MatmulRule.floats_of_norms`."""
        h, t, k, n = self.sizes
        return h * t * (2 * t + k + n)

    def pair_norms(self, pair: Pair) -> Float[Array, " batch"]:
        """See `MatmulRule.pair_norms`."""
        inputs = einsum("bhtk,bhsk->bhts", pair.a, pair.a)
        cotangents = einsum("bhtn,bhsn->bhts", pair.g, pair.g)
        return jnp.sum(gram_squared_norms(inputs, cotangents), axis=1)


def multiply(pair: Pair) -> Float[Array, "batch h k n"]:
    """Returns A'G for every example and every h."""
    a, g = (leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]) for leaf in pair)
    # XLA on a CPU is faster with the longer side of the product last.
    if a.shape[-1] <= g.shape[-1]:
        products = einsum("btk,btn->bkn", a, g)
    else:
        products = einsum("btk,btn->bnk", a, g).swapaxes(1, 2)
    return products.reshape(*pair.a.shape[:2], *products.shape[1:])


def einsum(subscripts: str, left: Array, right: Array) -> Array:
    """Multiplies at the highest precision, in float32 or wider."""
    return jnp.einsum(
        subscripts, left, right, precision=HIGHEST, preferred_element_type=wide_dtype(left.dtype)
    )


def gram_squared_norms(
    inputs: Float[Array, "*batch t t"], cotangents: Float[Array, "*batch t t"]
) -> Float[Array, "*batch"]:
    """Returns `<A A', G G'>` from the two Gram matrices, rounded up."""
    # By Cauchy-Schwarz the product of their norms is at least the sum of the squared terms.
    sizes = jnp.sqrt(sum_of_squares(inputs, (-2, -1))) * jnp.sqrt(
        sum_of_squares(cotangents, (-2, -1))
    )
    return round_up(jnp.sum(inputs * cotangents, axis=(-2, -1)), sizes, inputs.shape[-1])
