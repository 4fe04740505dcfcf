"""Norm rules for matrix products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rule_laws import check_laws, floats, ids, sites_of

import dpoptax
from dpoptax.per_example._norm_rules.matmul import DirectMatmul, GramMatmul, OuterProduct
from dpoptax.per_example._norm_rules.matmul_layout import sizes_of


def product(w, x):
    return jnp.sum(jnp.tanh(x @ w))


def from_the_left(w, x):
    return jnp.sum(jnp.tanh(w @ x))


def transposed(w, x):
    return jnp.sum(jnp.tanh(x @ w.T))


def by_head(w, x):
    return jnp.sum(jnp.tanh(jnp.einsum("tbi,bji->tbj", x, w)))


def two_axes_contracted(w, x):
    return jnp.sum(jnp.tanh(jnp.einsum("tij,jik->tk", x, w)))


def used_twice(w, x):
    return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w))


def used_and_transposed(w, x):
    return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w.T))


def shared_by_a_scan(w, x):
    return jnp.sum(jax.lax.scan(lambda c, t: (jnp.tanh(c @ w + t), None), jnp.ones(4), x)[0])


def sliced_by_a_scan(w, x):
    return jnp.sum(jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0])


def repeated(w, x):
    return jnp.sum(jnp.tanh(x @ jnp.broadcast_to(w, (4, 3))))


def part_dropped(w, x):
    return jnp.sum(jnp.tanh(x @ jnp.broadcast_to(w[:1], (4, 3))))


def lookup(w, i):
    return jnp.sum(jnp.tanh(w[i]))


@pytest.mark.parametrize(
    ("loss_fn", "shape", "example"),
    [
        (product, (6, 5), floats(6)),
        (product, (6, 1), floats(6)),
        (product, (1, 5), floats(1)),
        (by_head, (3, 4, 5), floats(1, 3, 5)),
        (sliced_by_a_scan, (3, 4, 4), floats(4)),
    ],
)
def test_the_outer_product_obeys_the_laws_for_one_row(loss_fn, shape, example):
    sites, spec = sites_of(loss_fn, shape, example)
    check_laws(OuterProduct.matches(sites, spec))
    assert DirectMatmul.matches(sites, spec) is None
    assert GramMatmul.matches(sites, spec) is None


@pytest.mark.parametrize(("shape", "is_vector"), [((6, 1), True), ((1, 5), True), ((6, 2), False)])
def test_a_vector_is_summed_over_chunks_side_by_side(shape, is_vector):
    """Rows that are not finite are left out of their chunk, and of no other."""
    sites, spec = sites_of(product, shape, floats(shape[0]))
    assert OuterProduct.matches(sites, spec).sums_to_vector == is_vector
    w = jax.random.normal(jax.random.key(0), shape)
    rows = jax.random.normal(jax.random.key(1), (700, shape[0])).at[300].set(jnp.nan)
    clipped = dpoptax.per_example_grads(product)(w, rows).clip_and_sum(
        dpoptax.clipping.FlatClip(0.5).weights
    )
    each = jax.vmap(jax.grad(product), (None, 0))(w, rows)
    norms = jnp.sqrt(jnp.sum(each**2, axis=(1, 2)))
    scaled = each * jnp.minimum(1.0, 0.5 / norms)[:, None, None]
    expected = jnp.sum(jnp.where(jnp.isfinite(norms)[:, None, None], scaled, 0.0), axis=0)
    np.testing.assert_allclose(clipped, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss_fn", "shape", "example"),
    [
        (product, (6, 5), floats(7, 6)),
        (from_the_left, (5, 6), floats(6, 7)),
        (transposed, (5, 6), floats(7, 6)),
        (by_head, (3, 4, 5), floats(2, 3, 5)),
        (two_axes_contracted, (3, 2, 4), floats(5, 2, 3)),
        (used_twice, (4, 4), floats(3, 4)),
        (shared_by_a_scan, (4, 4), floats(3, 4)),
        (sliced_by_a_scan, (3, 4, 4), floats(2, 4)),
    ],
)
def test_products_and_grams_obey_the_laws_for_several_rows(loss_fn, shape, example):
    sites, spec = sites_of(loss_fn, shape, example)
    check_laws(*(rule.matches(sites, spec) for rule in (DirectMatmul, GramMatmul)))
    assert OuterProduct.matches(sites, spec) is None


def test_sizes_count_slices_as_products_and_shared_steps_as_rows():
    (site,), _ = sites_of(sliced_by_a_scan, (3, 4, 4), floats(2, 4))
    assert sizes_of(site) == (3, 2, 4, 4)
    (site,), _ = sites_of(shared_by_a_scan, (4, 4), floats(3, 4))
    assert sizes_of(site) == (1, 3, 4, 4)


@pytest.mark.parametrize(
    ("loss_fn", "shape", "example"),
    [
        (used_and_transposed, (4, 4), floats(3, 4)),
        (repeated, (3,), floats(2, 4)),
        (part_dropped, (4, 3), floats(2, 4)),
        (lookup, (6, 3), ids(4)),
    ],
)
@pytest.mark.parametrize("rule", [OuterProduct, DirectMatmul, GramMatmul])
def test_other_uses_are_refused(rule, loss_fn, shape, example):
    assert rule.matches(*sites_of(loss_fn, shape, example)) is None


def test_grams_are_cheaper_for_few_rows_and_products_for_many():
    def costs(rows):
        use = sites_of(product, (64, 64), floats(rows, 64))
        return DirectMatmul.matches(*use).cost, GramMatmul.matches(*use).cost

    direct, gram = costs(4)
    assert gram < direct
    direct, gram = costs(256)
    assert direct < gram
