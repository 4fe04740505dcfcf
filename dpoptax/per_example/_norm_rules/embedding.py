"""Rows looked up in a table: the gradient of an example adds cotangents of equal tokens.

||grad||^2 = sum over distinct tokens of || sum of their cotangents ||^2
"""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpoptax._precision import widen
from dpoptax.per_example._norm_rules import materialize
from dpoptax.per_example._norm_rules.base import NormRule
from dpoptax.per_example._norm_rules.chunking import fold_chunks, map_chunks, on_cpu
from dpoptax.per_example._norm_rules.factors import Factors
from dpoptax.per_example._norm_rules.rounding import rounded_up, sum_of_squares
from dpoptax.per_example._tracing.site import Site


def candidates(sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> Iterator[NormRule]:
    """Yields the rule for leaves whose only use is one lookup of rows."""
    if len(sites) != 1 or not looks_up_rows(sites[0], spec):
        return
    (site,) = sites
    width = math.prod(spec.shape[1:])
    tokens = tokens_of(site, width)

    def squared_norms(factors: Sequence[Factors]) -> Float[Array, " batch"]:
        return segment_squared_norms(*as_rows(site, factors[0], spec), spec.shape[0])

    def total(factors: Sequence[Factors]) -> Float[Array, "..."]:
        return sum_of_rows(*as_rows(site, factors[0], spec), spec.shape[0]).reshape(spec.shape)

    yield NormRule(
        "segments",
        squared_norms,
        functools.partial(materialize.gradients, sites, spec),
        total,
        # A segment sum: a few passes over the cotangents.
        8.0 * tokens * width,
        tokens * width,
    )


def looks_up_rows(site: Site, spec: jax.ShapeDtypeStruct) -> bool:
    """Whether a site is `table[ids]`, whole rows of an unchanged leaf."""
    if site.primitive.name != "gather" or any(scan.sliced for scan in site.scans):
        return False
    if any(s.primitive is None or s.primitive.name != "convert_element_type" for s in site.steps):
        return False
    numbers = site.params["dimension_numbers"]
    (indices,) = site.operands
    width = len(spec.shape) - 1
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
    """How many rows one example looks up."""
    tokens = math.prod(site.output.shape) // width if width else 0
    return tokens * math.prod(scan.length for scan in site.scans)


def as_rows(
    site: Site, factors: Factors, spec: jax.ShapeDtypeStruct
) -> tuple[Int[Array, "batch t"], Float[Array, "batch t width"]]:
    """Brings the factors to tokens `(batch, T)` in the table and cotangents `(batch, T, width)`."""
    (indices,) = factors.operands
    ids = indices.reshape(indices.shape[0], math.prod(indices.shape[1:]))
    if ids.dtype.itemsize < 4:  # the table may have more rows than they can count
        ids = ids.astype(jnp.int32)
    dtype = widen(jnp.zeros((), spec.dtype)).dtype  # the lookup may be in a narrower one
    rows = widen(factors.cotangent).reshape(*ids.shape, math.prod(spec.shape[1:])).astype(dtype)
    last = max(0, site.parameter.shape[0] - 1)
    inside = (ids >= 0) & (ids <= last)
    # What the lookup dropped or clipped, its transpose drops or clips alike.
    if site.params["mode"] != jax.lax.GatherScatterMode.CLIP:
        rows = jnp.where(inside[..., None], rows, 0.0)
    return jnp.clip(ids, 0, last), rows


def segment_squared_norms(
    ids: Int[Array, "batch t"], rows: Float[Array, "batch t width"], rows_in_table: int
) -> Float[Array, " batch"]:
    """Sums the rows of equal ids within each example, and squares."""

    def of_chunk(chunk: tuple[Array, Array]) -> Float[Array, " rows"]:
        places, rows = chunk
        batch, tokens, width = rows.shape
        places = places + tokens * jnp.arange(batch, dtype=jnp.int32)[:, None]
        sums = _add_rows(jnp.zeros((batch * tokens, width), rows.dtype), (places, rows))
        squares = jnp.sum(jnp.square(sums).reshape(batch, tokens * width), axis=1)
        return rounded_up(squares, sum_of_squares(rows, (1, 2)), tokens)

    return map_chunks(of_chunk, (_place_of_equals(ids, rows_in_table), rows), _numbers(rows))


def sum_of_rows(
    ids: Int[Array, "batch t"], rows: Float[Array, "batch t width"], rows_in_table: int
) -> Float[Array, "rows_in_table width"]:
    """Sums the rows of equal ids over all examples."""
    table = jnp.zeros((rows_in_table, rows.shape[2]), rows.dtype)
    if rows_in_table == 0:
        return table
    return fold_chunks(_add_rows, table, (ids, rows), _numbers(rows))


def _numbers(rows: Float[Array, "batch t width"]) -> int:
    """What an example needs, for chunks whose rows and sums stay close to the processor."""
    return 8 * math.prod(rows.shape[1:])


def _first_of_equals(ids: Int[Array, "rows t"]) -> Int[Array, "rows t"]:
    return jnp.argmax(ids[:, :, None] == ids[:, None, :], axis=2).astype(jnp.int32)


def _add_rows(table: Array, chunk: tuple[Array, Array]) -> Array:
    places, rows = chunk
    flat = rows.reshape(places.size, rows.shape[-1])
    return table.at[places.reshape(-1)].add(flat, mode="promise_in_bounds")


def _place_of_equals(ids: Int[Array, "batch t"], rows_in_table: int) -> Int[Array, "batch t"]:
    """For every token a place in its example, the same one for equal tokens."""
    if ids.size == 0:
        return ids
    if not on_cpu():
        return map_chunks(_first_of_equals, ids, ids.shape[1] ** 2)
    places = jnp.arange(ids.shape[1], dtype=jnp.int32)

    def write_and_read(table: Array, row: Array) -> tuple[Array, Array]:
        # What earlier examples wrote is never read: this one first writes at all of its tokens.
        table = table.at[row].set(places, mode="promise_in_bounds")
        return table, table.at[row].get(mode="promise_in_bounds")

    return jax.lax.scan(write_and_read, jnp.zeros(max(1, rows_in_table), jnp.int32), ids)[1]
