"""Laws 2, 3 and 7 on leaves that are kept as factors, and through `Mechanism.release`.

The gradients of the small model of the other laws are materialized in every form.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
import registry

from dpoptax.clipping import FlatClip

BATCH = 5
RULE = FlatClip(1.0)
PARAMS = registry.wide_params()
forms = pytest.mark.parametrize("form", registry.FORMS.values(), ids=registry.FORMS)
ALL_LEAVES = jnp.ones(len(PARAMS))
# The discrete Gaussian takes long to compile.
mechanisms = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=[] if name == "gaussian" else pytest.mark.slow)
        for name, make in registry.MECHANISMS.items()
    ],
)


def examples(seed):
    return registry.wide_examples(BATCH, jax.random.key(seed))


def test_the_large_leaves_are_kept_as_factors():
    layout = registry.factored(registry.wide_loss)(PARAMS, examples(0)).layout
    kept = [layout.paths[leaf] for leaf in layout.rules if leaf not in layout.materialized]
    assert {"['outer']", "['sequence']", "['table']"} <= set(kept)


@functools.cache
def compiled(form):
    grads_fn = form(registry.wide_loss)

    @jax.jit
    def clipped_sum(examples, mask, counted):
        def weights(norms):  # the norms of a wrong implementation leave out a leaf
            leaves, structure = jax.tree.flatten(norms)
            return RULE.weights(structure.unflatten(map(jnp.multiply, leaves, counted)))

        return grads_fn(PARAMS, examples, mask=mask).clip_and_sum(weights)

    return clipped_sum


def clipped_sum(form, counted=ALL_LEAVES):
    """One compiled function for each form, and for all laws."""
    return lambda examples, mask: compiled(form)(examples, mask, counted)


@forms
def test_law_2_every_form_gives_the_clipped_sum_of_a_plain_loop(form):
    grad = jax.jit(jax.grad(registry.wide_loss))
    batch, expected = examples(1), jax.tree.map(jnp.zeros_like, PARAMS)
    for i in range(BATCH):
        gradient = grad(PARAMS, jax.tree.map(lambda leaf, i=i: leaf[i], batch))
        scale = min(1.0, 1 / registry.global_norm(gradient))
        expected = jax.tree.map(lambda e, g, scale=scale: e + scale * g, expected, gradient)
    actual = clipped_sum(form)(batch, jnp.ones(BATCH, bool))
    assert registry.distance(actual, expected) < 1e-5 * registry.global_norm(expected)


@forms
@pytest.mark.parametrize("filler", [1e30, jnp.inf, jnp.nan])
def test_law_3_padding_never_changes_the_sum(form, filler):
    mask = jnp.arange(BATCH) % 2 == 0
    tokens, x = examples(2)
    # Also a table lookup out of range, which gives NaN.
    padded = jnp.where(mask[:, None], tokens, 10**6), jnp.where(mask[:, None], x, filler)
    expected = clipped_sum(form)((tokens, x), mask)
    actual = clipped_sum(form)(padded, mask)
    assert registry.distance(actual, expected) == 0 < registry.global_norm(expected)


def neighbours(relation, seed):
    """Returns two pairs (examples, mask) that differ in one example, and the sensitivity."""
    here, mask = examples(seed), jnp.ones(BATCH, bool)
    row = seed % BATCH
    if relation == "replace_one":
        other = examples(seed + 1000)
        there = jax.tree.map(lambda a, b: a.at[row].set(b[-1]), here, other)
        return (here, mask), (there, mask), RULE.sensitivity(relation)
    return (here, mask), (here, mask.at[row].set(False)), RULE.sensitivity(relation)


def largest_move(release, relation, num_pairs=30):
    moves = []
    for seed in range(num_pairs):
        here, there, sensitivity = neighbours(relation, seed)
        moves.append(registry.distance(release(*here), release(*there)) / sensitivity)
    return max(moves)


@forms
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_special", "replace_one"])
def test_law_7_neighbours_move_the_clipped_sum_by_at_most_the_sensitivity(form, relation):
    assert 0.6 < largest_move(clipped_sum(form), relation) <= 1 + 1e-5


@pytest.mark.slow
@mechanisms
def test_law_7_neighbours_move_the_release_of_a_mechanism_by_at_most_the_sensitivity(make):
    """With one key both releases have the same noise."""
    grads_fn = registry.factored(registry.wide_loss)

    @jax.jit
    def release(examples, mask):
        grads = grads_fn(PARAMS, examples, mask=mask)
        return make().release(jax.random.key(0), grads, RULE, 1.0, 0)

    for relation in ("add_or_remove_one", "replace_one"):
        assert 0.5 < largest_move(release, relation) <= 1 + 1e-5


@forms
@pytest.mark.parametrize("leaf", range(len(PARAMS)), ids=sorted(PARAMS))
def test_a_norm_that_leaves_out_a_leaf_breaks_law_7(form, leaf):
    """So the tests above have power."""
    wrong = clipped_sum(form, ALL_LEAVES.at[leaf].set(0.0))
    assert largest_move(wrong, "add_or_remove_one", num_pairs=BATCH) > 1 + 1e-3
