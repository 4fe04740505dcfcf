"""A table that rows are looked up in and that is also a matrix: an embedding tied to its head.

With b_t the cotangents of the tokens, h_s the inputs and g_s the cotangents of the product,

    ||grad||^2 = ||lookup||^2 + ||product||^2 + 2 sum_t sum_s g_s[token_t] (b_t . h_s)
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax.per_example._norm_rules import embedding, matmul
from dpoptax.per_example._norm_rules.base import NormRule
from dpoptax.per_example._norm_rules.chunking import map_chunks
from dpoptax.per_example._norm_rules.factors import HIGHEST, Factors
from dpoptax.per_example._norm_rules.materialize import materialize
from dpoptax.per_example._norm_rules.matmul_layout import as_pair, sizes_of
from dpoptax.per_example._norm_rules.rounding import round_up, sum_of_squares
from dpoptax.per_example._tracing.site import Site


@dataclasses.dataclass(frozen=True, eq=False)
class TiedEmbedding(NormRule):
    """The norms of the lookup and of the product, and twice their inner product.

    Attributes:
        lookup: which of the two sites is the lookup, 0 or 1.
        product: the cheapest rule for the other site, the product.
    """

    lookup: int
    product: matmul.MatmulRule

    @classmethod
    def matches(cls, sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> "TiedEmbedding | None":
        """Accepts a leaf with two uses: a lookup of rows, and a product with the whole table."""
        if len(sites) != 2:
            return None
        lookup = 0 if embedding.looks_up_rows(sites[0], spec) else 1
        head = sites[1 - lookup]
        if not embedding.looks_up_rows(sites[lookup], spec) or not _multiplies_table(head, spec):
            return None
        rules = (matmul.OuterProduct, matmul.DirectMatmul, matmul.GramMatmul)
        products = [rule for rule in (kind.matches([head], spec) for kind in rules) if rule]
        if not products:
            return None
        return cls(tuple(sites), spec, lookup, min(products, key=lambda rule: rule.cost))

    @property
    def name(self) -> str:
        """See `NormRule.name`."""
        return f"segments, {self.product.name}"

    @property
    def cost(self) -> float:
        """See `NormRule.cost`."""
        _, width = self.spec.shape
        inner_products = self._tokens * self._outputs * (width + 2)
        lookup = embedding.segment_cost(self.sites[self.lookup], self.spec)
        return lookup + self.product.cost + inner_products

    def squared_norms(self, factors: Sequence[Factors]) -> Float[Array, " batch"]:
        """See `NormRule.squared_norms`."""
        num_floats = self.product.floats_of_norms + self._tokens * self._outputs
        return map_chunks(self._norms_of_chunk, list(factors), num_floats)

    def _norms_of_chunk(self, factors: Sequence[Factors]) -> Float[Array, " batch"]:
        rows, head = self.sites[self.lookup], self.sites[1 - self.lookup]
        of_rows, of_head = factors[self.lookup], factors[1 - self.lookup]
        size, width = self.spec.shape
        ids, cotangents = embedding.as_rows(rows, of_rows, self.spec)
        lookup = embedding.segment_squared_norms(ids, cotangents, size)
        product = self.product.squared_norms([of_head])
        # The head multiplies by the table or by its transpose: the shapes say which factor has one
        # number per row of the table, and which has one per column.
        pair = as_pair(head, of_head, self.spec)
        by_row, by_column = (pair.g, pair.a) if pair.a.shape[-1] == width else pair
        looked_up = jnp.take_along_axis(by_row[:, 0], ids[:, None, :], axis=2)
        inner = jnp.einsum("btw,bsw->bst", cotangents, by_column[:, 0], precision=HIGHEST)
        cross = 2 * jnp.sum(inner * looked_up, axis=(1, 2))
        # The cross term may be negative and cancel the others, so its own size counts as well.
        terms = _norm(looked_up) * _norm(cotangents) * _norm(by_column)
        # So may the terms within each part.
        products = sum_of_squares(pair.a, (3,)) * sum_of_squares(pair.g, (3,))
        terms += sum_of_squares(cotangents, (1, 2)) + jnp.sum(products, axis=(1, 2))
        sizes = lookup + product + terms
        return round_up(lookup + product + cross, sizes, self._tokens + self._outputs)

    def gradients(self, factors: Sequence[Factors]) -> Float[Array, "batch ..."]:
        """See `NormRule.gradients`."""
        return materialize(self.sites, factors, self.spec)

    def weighted_sum(self, factors: Sequence[Factors]) -> Float[Array, "..."]:
        """See `NormRule.weighted_sum`."""
        product = self.product.weighted_sum([factors[1 - self.lookup]])
        looked_up = embedding.as_rows(self.sites[self.lookup], factors[self.lookup], self.spec)
        # Into the product itself: a second table would take as much memory again.
        return embedding.add_rows(product, looked_up)

    @property
    def _tokens(self) -> int:
        return embedding.tokens_of(self.sites[self.lookup], self.spec.shape[1])

    @property
    def _outputs(self) -> int:
        return sizes_of(self.sites[1 - self.lookup]).t


def _norm(leaf: Array) -> Float[Array, " batch"]:
    """The norm of all that each example holds."""
    return jnp.sqrt(sum_of_squares(leaf, tuple(range(1, leaf.ndim))))


def _multiplies_table(site: Site, spec: jax.ShapeDtypeStruct) -> bool:
    """Whether a site is a product with the whole table or its transpose.

    A square table is refused, because the shapes must tell the two apart.
    """
    if site.primitive is not jax.lax.dot_general_p or any(scan.sliced for scan in site.scans):
        return False
    if len(spec.shape) != 2 or spec.shape[0] == spec.shape[1] or not site.preserves_norms(spec):
        return False
    steps = {step.primitive for step in site.steps if step.primitive is not None}
    h, _, k, n = sizes_of(site)
    allowed = {jax.lax.transpose_p, jax.lax.convert_element_type_p}
    return steps <= allowed and h == 1 and {k, n} == set(spec.shape)
