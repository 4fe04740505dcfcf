"""Rows of canaries in a batch have the gradients of the canaries, in every form of gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry

from dpoptax.audit._canary_grads import CanaryGrads, SparseVectors
from dpoptax.per_example._stacked import StackedGrads
from dpoptax.transforms._scaled_grads import ScaledGrads

BATCH = 7
# Rows 1 and 5 are canaries 2 and 0; row 3 is padding. In order of the leaves: b, s, w.
SLOTS = jnp.array([-1, 2, -1, -1, -1, 0, -1])
MASK = jnp.array([True, True, True, False, True, True, True])
VECTORS = SparseVectors(
    positions=[jnp.array([[0], [2], [1]]), jnp.zeros((3, 0), jnp.int32),
               jnp.array([[4, 2], [0, 0], [3, 1]])],
    values=[jnp.array([3.0, 0.0, -2.0]), jnp.array([0.0, 1.5, 4.0]), jnp.array([-5.0, 7.0, 0.0])],
    directions=[jnp.array([0.6, 0.0, -0.8]), jnp.array([0.0, 1.0, 0.6]),
                jnp.array([-0.8, 0.0, 0.0])],
)  # fmt: skip


def batch():
    """Examples whose rows of canaries and padding hold NaN."""
    x, y = registry.examples(BATCH)
    return jnp.where((SLOTS >= 0)[:, None] | ~MASK[:, None], jnp.nan, x), y


def reference(grads):
    """The stacked gradients of the clean rows, with the vectors written into them."""
    tree = {name: np.array(leaf) for name, leaf in grads.stacked().items()}
    for row, slot in ((1, 2), (5, 0)):
        for name, at, value in zip("bsw", VECTORS.positions, VECTORS.values, strict=True):
            tree[name][row] = 0
            tree[name][(row, *at[slot])] = value[slot]
    return StackedGrads(jax.tree.map(jnp.asarray, tree), MASK)


@functools.cache
def both(form):
    make = registry.FORMS[form](registry.loss)
    grads = make(registry.params(), batch(), mask=MASK)
    return CanaryGrads(MASK, grads, SLOTS, VECTORS), reference(
        registry.stacked(registry.loss)(registry.params(), batch(), mask=MASK)
    )


def assert_close(tree, other):
    for leaf, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.seconds
@pytest.mark.parametrize("form", registry.FORMS)
def test_norms_sums_and_stacked_rows_are_those_of_the_written_vectors(form):
    found, expected = both(form)
    assert_close(found.squared_norms(), expected.squared_norms())
    weights = jnp.linspace(0.2, 1.4, BATCH).at[4].set(0.0)
    assert_close(found.weighted_sum(weights), expected.weighted_sum(weights))
    assert_close(found.stacked(), expected.stacked())


@pytest.mark.seconds
@pytest.mark.parametrize("form", registry.FORMS)
@pytest.mark.parametrize("rule", ["flat", "group"])
def test_every_form_clips_and_sums_the_canaries_of_its_part(form, rule):
    found, expected = both(form)
    weights_of = registry.CLIP_RULES[rule](2.0).weights
    assert_close(found.clip_and_sum(weights_of), expected.clip_and_sum(weights_of))


@pytest.mark.seconds
def test_scales_before_the_clip_also_scale_canaries():
    found, expected = both("microbatched")
    weights_of = registry.CLIP_RULES["flat"](2.0).weights
    by_leaf = {"w": jnp.array(0.1), "b": jnp.array(3.0), "s": jnp.array(1.0)}
    by_coordinate = jax.tree.map(lambda leaf: 0.5 + jnp.arange(1.0 * leaf.size).reshape(leaf.shape),
                                 registry.params())  # fmt: skip
    for scale in (by_leaf, by_coordinate):
        assert_close(
            ScaledGrads(MASK, found, scale).clip_and_sum(weights_of),
            ScaledGrads(MASK, expected, scale).clip_and_sum(weights_of),
        )


def test_products_are_those_of_the_directions():
    tree = {"b": jnp.array([1.0, 2.0, 3.0]), "s": jnp.array(5.0), "w": jnp.full((5, 3), 7.0)}
    np.testing.assert_allclose(VECTORS.products(tree), [0.6 - 5.6, 5.0, -1.6 + 3.0], rtol=1e-6)
