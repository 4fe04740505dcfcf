"""Rows looked up in a table: the gradient of an example adds the cotangents of equal tokens.

||grad||^2 = sum over distinct tokens of || sum of their cotangents ||^2
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpoptax._precision import wide_dtype
from dpoptax.per_example._norm_rules import cost_model
from dpoptax.per_example._norm_rules.base import NormRule
from dpoptax.per_example._norm_rules.chunking import map_chunks, on_cpu
from dpoptax.per_example._norm_rules.factors import Factors
from dpoptax.per_example._norm_rules.rounding import round_up, sum_of_squares
from dpoptax.per_example._tracing.site import Site


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddingLookup(NormRule):
    """Sums the cotangents of equal tokens by a segment sum, without a table per example."""

    name = "segments"

    @classmethod
    def matches(cls, sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> "EmbeddingLookup | None":
        """Accepts a leaf with one use only, a lookup of whole rows."""
        if len(sites) != 1 or not looks_up_rows(sites[0], spec):
            return None
        return cls(tuple(sites), spec)

    @property
    def cost(self) -> float:
        """See `NormRule.cost`."""
        return segment_cost(self.sites[0], self.spec)

    def prepare(self, factors: Sequence[Factors]) -> Sequence[Factors]:
        """Adds up the cotangents of equal tokens of an example; one of the tokens holds the sum.

        Then an example adds at most one term to a row, and its norm is that of what it adds.
        """
        ids, rows = as_rows(self.sites[0], factors[0], self.spec)
        return [Factors((ids,), add_equal_tokens(ids, rows, self.spec.shape[0]))]

    def squared_norms(self, factors: Sequence[Factors]) -> Float[Array, " batch"]:
        """See `NormRule.squared_norms`."""
        return jnp.sum(jnp.square(factors[0].cotangent), axis=(1, 2))

    def gradients(self, factors: Sequence[Factors]) -> Float[Array, "batch ..."]:
        """See `NormRule.gradients`."""
        size = math.prod(self.spec.shape)
        return map_chunks(
            jax.vmap(self._sum_of_rows), (factors[0].operands[0], factors[0].cotangent), size
        )

    def weighted_sum(self, factors: Sequence[Factors]) -> Float[Array, "..."]:
        """See `NormRule.weighted_sum`."""
        return self._sum_of_rows((factors[0].operands[0], factors[0].cotangent))

    @property
    def num_terms(self) -> int:
        """See `NormRule.num_terms`: after `prepare`, one token of an example has all of a row."""
        return 1

    def _sum_of_rows(self, chunk: tuple[Array, Array]) -> Float[Array, "..."]:
        ids, rows = chunk
        table = jnp.zeros((self.spec.shape[0], rows.shape[-1]), rows.dtype)
        return add_rows(table, (ids, rows)).reshape(self.spec.shape)


def looks_up_rows(site: Site, spec: jax.ShapeDtypeStruct) -> bool:
    """Whether a site is `table[ids]`: whole rows of the leaf itself."""
    if site.primitive is not jax.lax.gather_p or any(scan.sliced for scan in site.scans):
        return False
    if any(step.primitive is not jax.lax.convert_element_type_p for step in site.steps):
        return False
    numbers = site.params["dimension_numbers"]
    (indices,) = site.operands
    width = len(spec.shape) - 1
    # One index per lookup, into the first axis; the other axes are whole and last in the output.
    return (
        numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and site.params["slice_sizes"] == (1, *spec.shape[1:])
        and numbers.offset_dims
        == tuple(range(len(site.output.shape) - width, len(site.output.shape)))
        and indices.shape[-1] == 1
    )


def tokens_of(site: Site, width: int) -> int:
    """How many rows of `width` numbers one example looks up, over all scans."""
    tokens = math.prod(site.output.shape) // width if width else 0
    return tokens * site.num_runs


def segment_cost(site: Site, spec: jax.ShapeDtypeStruct) -> float:
    """The cost of `segment_squared_norms` for one example."""
    width = math.prod(spec.shape[1:])
    return cost_model.constants([site]).segment_sum * tokens_of(site, width) * width


def as_rows(
    site: Site, factors: Factors, spec: jax.ShapeDtypeStruct
) -> tuple[Int[Array, "batch t"], Float[Array, "batch t width"]]:
    """Returns the tokens `(batch, T)`, all inside the table, and their cotangents."""
    (indices,) = factors.operands
    ids = indices.reshape(indices.shape[0], math.prod(indices.shape[1:]))
    # An 8- or 16-bit type may be too narrow to count the rows of the table.
    if ids.dtype.itemsize < 4:
        ids = ids.astype(jnp.int32)
    # The lookup may be in a narrower dtype than the leaf, and the gradient has that of the leaf.
    rows = factors.cotangent.reshape(*ids.shape, math.prod(spec.shape[1:]))
    rows = rows.astype(wide_dtype(spec.dtype))
    last = max(0, site.parameter.shape[0] - 1)
    inside = (ids >= 0) & (ids <= last)
    # A lookup beyond the table is clipped to it or dropped, and so is its gradient.
    if site.params["mode"] != jax.lax.GatherScatterMode.CLIP:
        rows = jnp.where(inside[..., None], rows, 0.0)
    return jnp.clip(ids, 0, last), rows


def add_equal_tokens(
    ids: Int[Array, "batch t"], rows: Float[Array, "batch t width"], rows_in_table: int
) -> Float[Array, "batch t width"]:
    """Sums the rows of equal ids within each example; the other rows of these ids become zero."""

    def sums(chunk: tuple[Array, Array]) -> Float[Array, "batch t width"]:
        slots, rows = chunk
        batch, tokens, width = rows.shape
        if not on_cpu():
            # One table per example: a device then needs only the rows of its own examples.
            return jax.vmap(add_rows)(jnp.zeros_like(rows), (slots, rows))
        # Every example has `tokens` slots in one array, as it has at most that many distinct ids.
        slots = slots + tokens * jnp.arange(batch, dtype=jnp.int32)[:, None]
        table = jnp.zeros((batch * tokens, width), rows.dtype)
        return add_rows(table, (slots, rows)).reshape(rows.shape)

    return map_chunks(sums, (_slots(ids, rows_in_table), rows), _floats_per_example(rows))


def segment_squared_norms(
    ids: Int[Array, "batch t"], rows: Float[Array, "batch t width"], rows_in_table: int
) -> Float[Array, " batch"]:
    """Sums the rows of equal ids within each example, and squares the sums."""
    sums = add_equal_tokens(ids, rows, rows_in_table)
    squares = jnp.sum(jnp.square(sums), axis=(1, 2))
    return round_up(squares, sum_of_squares(rows, (1, 2)), rows.shape[1])


def _floats_per_example(rows: Float[Array, "batch t width"]) -> int:
    return cost_model.SEGMENT_CHUNK_FACTOR * math.prod(rows.shape[1:])


def add_rows(table: Array, chunk: tuple[Array, Array]) -> Array:
    """Adds rows `(..., width)` to the rows of a table at their ids `(...)`, all inside of it."""
    ids, rows = chunk
    flat = rows.reshape(ids.size, rows.shape[-1])
    return table.at[ids.reshape(-1)].add(flat, mode="promise_in_bounds")


def _slots(ids: Int[Array, "batch t"], rows_in_table: int) -> Int[Array, "batch t"]:
    """For every token a position in its example, the same one for equal tokens."""
    if ids.size == 0:
        return ids
    if not on_cpu():
        # All pairs of tokens at once: quadratic, but without a loop over the examples.
        return map_chunks(_first_equal, ids, ids.shape[1] ** 2)
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)

    def write_and_read(table: Array, row: Array) -> tuple[Array, Array]:
        # One table serves all examples: each reads only entries that it has just written.
        table = table.at[row].set(positions, mode="promise_in_bounds")
        return table, table.at[row].get(mode="promise_in_bounds")

    return jax.lax.scan(write_and_read, jnp.zeros(max(1, rows_in_table), jnp.int32), ids)[1]


def _first_equal(ids: Int[Array, "rows t"]) -> Int[Array, "rows t"]:
    return jnp.argmax(ids[:, :, None] == ids[:, None, :], axis=2).astype(jnp.int32)
