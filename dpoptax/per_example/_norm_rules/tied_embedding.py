"""A table that rows are looked up in and that is also a matrix: an embedding tied to its head.

With b_t the cotangents of the tokens, h_s the inputs and g_s the cotangents of the product,

    ||grad||^2 = ||lookup||^2 + ||product||^2 + 2 sum_t sum_s g_s[token_t] (b_t . h_s)
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax._precision import wide_dtype, widen
from dpoptax.per_example._norm_rules import embedding, matmul
from dpoptax.per_example._norm_rules.base import NormRule
from dpoptax.per_example._norm_rules.chunking import map_chunks
from dpoptax.per_example._norm_rules.factors import HIGHEST, Factors
from dpoptax.per_example._norm_rules.materialize import materialize
from dpoptax.per_example._norm_rules.matmul_layout import as_pair, sizes_of
from dpoptax.per_example._norm_rules.rounding import round_up, sum_of_squares
from dpoptax.per_example._tracing.site import Site


class HeadParts(NamedTuple):
    """What the norms of a tied table need of its product, or shapes and dtypes of that.

    Attributes:
        norm: squared norms of the gradients of the product alone, `(batch,)`.
        terms: sums of the squared norms of their terms, `(batch,)`.
        looked_up: the factor with one number per row of the table, `(batch, S, T)`: of its numbers
            only those of the rows that were looked up.
        by_column: the other factor, `(batch, S, width)`.
    """

    norm: Any
    terms: Any
    looked_up: Any
    by_column: Any


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

        def norms(chunk: Sequence[Factors]) -> Float[Array, " batch"]:
            of_rows = chunk[self.lookup]
            parts = self._parts_of_chunk(of_rows, chunk[1 - self.lookup])
            return self._norms_of_chunk(of_rows, parts)

        return map_chunks(norms, list(factors), self._floats_per_example)

    def in_order(self, of_rows: Factors, of_head: Factors) -> list[Factors]:
        """Returns the factors of the two sites in the order of the sites."""
        return [of_rows, of_head] if self.lookup == 0 else [of_head, of_rows]

    @property
    def head_specs(self) -> HeadParts:
        """Shapes and dtypes of `head_parts` for one example."""
        head, dtype = self.sites[1 - self.lookup], wide_dtype(self.spec.dtype)
        by_row, by_column = self._by_row_and_column(head.output.dtype, head.operands[0].dtype)
        return HeadParts(
            norm=jax.ShapeDtypeStruct((), dtype),
            terms=jax.ShapeDtypeStruct((), dtype),
            looked_up=jax.ShapeDtypeStruct((self._outputs, self._tokens), by_row),
            by_column=jax.ShapeDtypeStruct((self._outputs, self.spec.shape[1]), by_column),
        )

    def head_parts(self, of_rows: Factors, of_head: Factors) -> HeadParts:
        """Returns all that the norms need of the product; reads only the indices of the lookup."""
        specs = self.head_specs

        def parts(chunk: tuple[Factors, Factors]) -> HeadParts:
            found = self._parts_of_chunk(*chunk)
            return jax.tree.map(lambda leaf, spec: leaf.astype(spec.dtype), found, specs)

        return map_chunks(parts, (of_rows, of_head), self._floats_per_example)

    def norms_from_parts(self, of_rows: Factors, parts: HeadParts) -> Float[Array, " batch"]:
        """Returns what `squared_norms` returns, from the factors of the lookup and the parts."""

        def norms(chunk: tuple[Factors, HeadParts]) -> Float[Array, " batch"]:
            of_rows, parts = chunk
            return self._norms_of_chunk(of_rows, jax.tree.map(widen, parts))

        return map_chunks(norms, (of_rows, parts), self._floats_per_example)

    def _parts_of_chunk(self, of_rows: Factors, of_head: Factors) -> HeadParts:
        head = self.sites[1 - self.lookup]
        ids, _ = embedding.as_rows(self.sites[self.lookup], of_rows, self.spec)
        pair = as_pair(head, of_head, self.spec)
        by_row, by_column = self._by_row_and_column(pair.g, pair.a)
        # Terms may cancel, so their own size counts as well.
        products = sum_of_squares(pair.a, (3,)) * sum_of_squares(pair.g, (3,))
        return HeadParts(
            norm=self.product.squared_norms([of_head]),
            terms=jnp.sum(products, axis=(1, 2)),
            looked_up=jnp.take_along_axis(by_row[:, 0], ids[:, None, :], axis=2),
            by_column=by_column[:, 0],
        )

    def _norms_of_chunk(self, of_rows: Factors, parts: HeadParts) -> Float[Array, " batch"]:
        ids, cotangents = embedding.as_rows(self.sites[self.lookup], of_rows, self.spec)
        lookup = embedding.segment_squared_norms(ids, cotangents, self.spec.shape[0])
        looked_up, by_column = parts.looked_up, parts.by_column
        inner = jnp.einsum("btw,bsw->bst", cotangents, by_column, precision=HIGHEST)
        cross = 2 * jnp.sum(inner * looked_up, axis=(1, 2))
        # The cross term may be negative and cancel the others, so its own size counts as well.
        terms = _norm(looked_up) * _norm(cotangents) * _norm(by_column)
        # So may the terms within each part.
        terms += sum_of_squares(cotangents, (1, 2)) + parts.terms
        sizes = lookup + parts.norm + terms
        return round_up(lookup + parts.norm + cross, sizes, self._tokens + self._outputs)

    def _by_row_and_column(self, g: Any, a: Any) -> tuple[Any, Any]:
        """Sorts the factors of the product: one number per row of the table, or per column."""
        # The head multiplies by the table or by its transpose; the shapes say which.
        return (g, a) if self.product.sizes.k == self.spec.shape[1] else (a, g)

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
    def _floats_per_example(self) -> int:
        return self.product.floats_of_norms + self._tokens * self._outputs

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
