"""A table that rows are looked up in and that is also a matrix: an embedding tied to its head.

With b_t the cotangents of the tokens, h_s the inputs and g_s the cotangents of the product,

    ||grad||^2 = ||lookup||^2 + ||product||^2 + 2 sum_t sum_s g_s[token_t] (b_t . h_s)
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax.per_example._norm_rules import embedding, materialize, matmul
from dpoptax.per_example._norm_rules.base import NormRule
from dpoptax.per_example._norm_rules.factors import HIGHEST, Factors
from dpoptax.per_example._norm_rules.rounding import rounded_up, sum_of_squares
from dpoptax.per_example._tracing.site import Site


def candidates(sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> Iterator[NormRule]:
    """Yields the ways for leaves with one lookup of rows and one product."""
    if len(sites) != 2:
        return
    lookup = 0 if embedding.looks_up_rows(sites[0], spec) else 1
    rows, head = sites[lookup], sites[1 - lookup]
    if not embedding.looks_up_rows(rows, spec) or not _multiplies_rows(head, spec):
        return
    size, width = spec.shape
    tokens, outputs = embedding.tokens_of(rows, width), matmul.sizes(head).t

    def squared_norms(product: NormRule, factors: Sequence[Factors]) -> Float[Array, " batch"]:
        ids, cotangents = embedding.as_rows(rows, factors[lookup], spec)
        of_lookup = embedding.segment_squared_norms(ids, cotangents, size)
        of_product = product.squared_norms([factors[1 - lookup]])
        pair = matmul.as_pair(head, factors[1 - lookup])
        by_row, by_width = (pair.g, pair.a) if pair.a.shape[-1] == width else pair
        looked_up = jnp.take_along_axis(by_row[:, 0], ids[:, None, :], axis=2)
        inner = jnp.einsum("btw,bsw->bst", cotangents, by_width[:, 0], precision=HIGHEST)
        cross = 2 * jnp.sum(inner * looked_up, axis=(1, 2))
        terms = _size(looked_up) * _size(cotangents) * _size(by_width)
        sizes = of_lookup + of_product + terms
        return rounded_up(of_lookup + of_product + cross, sizes, tokens + outputs)

    for product in matmul.candidates([head], spec):
        yield NormRule(
            f"segments, {product.name}",
            functools.partial(squared_norms, product),
            functools.partial(materialize.gradients, sites, spec),
            functools.partial(materialize.total, sites, spec),
            8.0 * tokens * width + product.operations + tokens * outputs * (width + 2),
            tokens * width + product.memory + 2 * tokens * outputs,
        )


def _size(leaf: Array) -> Float[Array, " batch"]:
    """The norm of what each example holds."""
    return jnp.sqrt(sum_of_squares(leaf, tuple(range(1, leaf.ndim))))


def _multiplies_rows(site: Site, spec: jax.ShapeDtypeStruct) -> bool:
    """Whether a site is a product with the table or its transpose, and which is told by shapes."""
    if site.primitive.name != "dot_general" or any(scan.sliced for scan in site.scans):
        return False
    if len(spec.shape) != 2 or spec.shape[0] == spec.shape[1] or not site.preserves_norms(spec):
        return False
    steps = {step.primitive.name for step in site.steps if step.primitive is not None}
    h, _, k, n = matmul.sizes(site)
    return steps <= {"transpose", "convert_element_type"} and h == 1 and {k, n} == set(spec.shape)
