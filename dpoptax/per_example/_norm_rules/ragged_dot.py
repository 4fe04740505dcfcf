"""Experts: the gradient of an example is A'G for the rows of each group.

The rules are those of `matmul`, for rows that meet only the rows of their own group.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpoptax._precision import wide_dtype
from dpoptax.per_example._grouped_rows import group_of_rows, grouped_outer
from dpoptax.per_example._norm_rules.base import NormRule
from dpoptax.per_example._norm_rules.chunking import map_chunks, on_cpu
from dpoptax.per_example._norm_rules.factors import HIGHEST, Factors, to_leaf
from dpoptax.per_example._norm_rules.matmul import gram_squared_norms
from dpoptax.per_example._norm_rules.rounding import round_up, sum_of_squares
from dpoptax.per_example._primitives.ragged_dot import RAGGED_DOT
from dpoptax.per_example._tracing.site import Site


class Rows(NamedTuple):
    """The rows of every example and every step of the scans that slice the leaf."""

    a: Float[Array, "batch h t k"]
    g: Float[Array, "batch h t n"]
    groups: Int[Array, "batch h t"]


@dataclasses.dataclass(frozen=True, eq=False)
class RaggedRule(NormRule):
    """What the two rules share."""

    @classmethod
    def matches(cls, sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> "RaggedRule | None":
        """Accepts a leaf with one use."""
        if len(sites) != 1 or sites[0].primitive is not RAGGED_DOT.primitive:
            return None
        (site,) = sites
        if not site.preserves_norms(spec):
            return None
        return cls(tuple(sites), spec)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Returns H slices, T rows of each slice, E groups, and matrices of K x N."""
        (site,) = self.sites
        # The rows of every step of a scan that shares the leaf are more rows.
        rows = site.output.shape[0] * site.num_uses
        return site.num_slices, rows, *site.parameter.shape

    @property
    @abc.abstractmethod
    def floats_of_norms(self) -> int:
        """How many floats `norms_of` needs for one example."""

    @abc.abstractmethod
    def norms_of(self, rows: Rows) -> Float[Array, " batch"]:
        """The squared norms, for one step of the scans."""

    def squared_norms(self, factors: Sequence[Factors]) -> Float[Array, " batch"]:
        """See `NormRule.squared_norms`."""

        def of_chunk(chunk: Sequence[Factors]) -> Array:
            rows = self._rows(chunk)
            batch, h = rows.groups.shape[:2]
            flat = Rows(*(leaf.reshape(batch * h, *leaf.shape[2:]) for leaf in rows))
            return jnp.sum(self.norms_of(flat).reshape(batch, h), axis=1)

        return map_chunks(of_chunk, list(factors), self.floats_of_norms)

    def gradients(self, factors: Sequence[Factors]) -> Float[Array, "batch ..."]:
        """See `NormRule.gradients`."""
        products = jax.vmap(jax.vmap(self._outer))(*self._rows(factors))
        return jax.vmap(self._to_leaf)(products)

    def weighted_sum(self, factors: Sequence[Factors]) -> Float[Array, "..."]:
        """See `NormRule.weighted_sum`."""
        # The rows of the batch are more rows.
        rows = (leaf.swapaxes(0, 1) for leaf in self._rows(factors))
        joined = (leaf.reshape(len(leaf), -1, *leaf.shape[3:]) for leaf in rows)
        return self._to_leaf(jax.vmap(self._outer)(*joined))

    def _rows(self, factors: Sequence[Factors]) -> Rows:
        ((a, group_sizes), g) = factors[0]
        (site,) = self.sites
        h, t, *_ = self.sizes
        dtype, batch = wide_dtype(self.spec.dtype), len(g)
        of_run: Callable[[Array], Array] = functools.partial(
            group_of_rows, num_rows=site.output.shape[0]
        )
        for _ in range(1 + len(site.scans)):
            of_run = jax.vmap(of_run)
        sliced = [1 + i for i, scan in enumerate(site.scans) if scan.sliced]

        def by_slice(leaf: Array) -> Array:
            # Scans that slice the leaf come first; those that share it become a part of T.
            return jnp.moveaxis(leaf, sliced, range(1, 1 + len(sliced)))

        return Rows(
            by_slice(a.astype(dtype)).reshape(batch, h, t, a.shape[-1]),
            by_slice(g.astype(dtype)).reshape(batch, h, t, g.shape[-1]),
            by_slice(of_run(group_sizes)).reshape(batch, h, t),
        )

    def _outer(self, a: Array, g: Array, groups: Array) -> Array:
        num_groups = self.sites[0].parameter.shape[0]
        return grouped_outer(a, g, groups, num_groups, HIGHEST, a.dtype)

    def _to_leaf(self, products: Float[Array, "h e k n"]) -> Array:
        (site,) = self.sites
        slices = [scan.length for scan in site.scans if scan.sliced]
        return to_leaf(site, products.reshape(*slices, *products.shape[1:]), self.spec)


@dataclasses.dataclass(frozen=True, eq=False)
class DirectRagged(RaggedRule):
    """Multiplies A'G of every group, squares it and drops it."""

    name = "direct, by group"

    @property
    def cost(self) -> float:
        """See `NormRule.cost`."""
        h, t, e, k, n = self.sizes
        # On a CPU all rows are multiplied for every group.
        return h * t * k * n * (e if on_cpu() else 1) + 2 * h * e * k * n

    @property
    def floats_of_norms(self) -> int:
        """See `RaggedRule.floats_of_norms`."""
        h, t, e, k, n = self.sizes
        return h * (e * k * n + t * (k + n))

    def norms_of(self, rows: Rows) -> Float[Array, " batch"]:
        """See `RaggedRule.norms_of`."""
        terms = sum_of_squares(rows.a, (2,)) * sum_of_squares(rows.g, (2,))
        terms = jnp.where(rows.groups < self.sites[0].parameter.shape[0], terms, 0)
        products = jax.vmap(self._outer)(*rows)
        squares = jnp.sum(jnp.square(products), axis=(1, 2, 3))
        return round_up(squares, jnp.sum(terms, axis=1), rows.a.shape[1])


@dataclasses.dataclass(frozen=True, eq=False)
class GramRagged(RaggedRule):
    """Multiplies the two Gram matrices, and keeps the pairs of rows of one group."""

    name = "Gram, by group"

    @property
    def cost(self) -> float:
        """See `NormRule.cost`."""
        h, t, _, k, n = self.sizes
        return h * t * t * (k + n) + 3 * h * t * t

    @property
    def floats_of_norms(self) -> int:
        """See `RaggedRule.floats_of_norms`."""
        h, t, _, k, n = self.sizes
        return h * t * (3 * t + k + n)

    def norms_of(self, rows: Rows) -> Float[Array, " batch"]:
        """See `RaggedRule.norms_of`."""
        same = rows.groups[:, :, None] == rows.groups[:, None, :]
        same &= (rows.groups < self.sites[0].parameter.shape[0])[:, None, :]

        def gram(leaf: Array) -> Array:
            products = jnp.einsum("btk,bsk->bts", leaf, leaf, precision=HIGHEST)
            return jnp.where(same, products, 0)

        return gram_squared_norms(gram(rows.a), gram(rows.g))
