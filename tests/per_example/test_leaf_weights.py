"""Weights per group of parameters: the same sums in every form, in as many passes as before."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry

import dpoptax
from dpoptax.per_example._stacked import StackedGrads

BATCH = 7
MASK = jnp.arange(BATCH) != 5
KEYS = jax.random.split(jax.random.key(0), 6)


def loss(params, example):
    """A tied table, scanned layers, a weight that is used twice, an adapter, and a power."""
    tokens, x = example

    def layer(x, weights):
        return x + jnp.tanh(x @ weights), None

    x, _ = jax.lax.scan(jax.checkpoint(layer), params["table"][tokens] + x, params["layers"])
    x = jnp.tanh(x @ params["shared"]) @ params["shared"]
    x = x + jnp.tanh(x @ params["adapter"]["down"]) @ params["adapter"]["up"]
    logits = x @ params["table"].T + params["power"] ** 3
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])


PARAMS = {
    "table": jax.random.normal(KEYS[0], (11, 8)),
    "layers": 0.3 * jax.random.normal(KEYS[1], (3, 8, 8)),
    "shared": 0.3 * jax.random.normal(KEYS[2], (8, 8)),
    "adapter": {"down": jax.random.normal(KEYS[3], (8, 1)), "up": jnp.ones((1, 8))},
    "power": jnp.linspace(-1.0, 1.0, 11),
}
EXAMPLES = (
    jax.random.randint(KEYS[4], (BATCH, 9), 0, 11),
    jax.random.normal(KEYS[5], (BATCH, 9, 8)),
)
WEIGHTS = dict(
    zip(sorted(PARAMS), jnp.linspace(0.1, 2.0, 5 * BATCH).reshape(5, BATCH), strict=True)
)
# One array for both parts of the adapter; another example is left out of each group.
WEIGHTS = {name: leaf.at[number].set(0) for number, (name, leaf) in enumerate(WEIGHTS.items())}


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(name, marks=() if name == "recomputed" else pytest.mark.slow)
        for name in registry.FORMS
    ],
)
def test_a_prefix_gives_the_sums_of_the_exact_gradients(form):
    @jax.jit
    def read(params, examples, weights):
        exact = jax.vmap(jax.grad(loss), (None, 0))(params, examples)
        grads = registry.FORMS[form](loss)(params, examples, mask=MASK)
        return exact, grads.weighted_sum(weights)

    exact, found = read(PARAMS, EXAMPLES, WEIGHTS)
    for a, scales, leaf in zip(
        jax.tree.leaves(found),
        jax.tree.leaves(jax.tree.broadcast(WEIGHTS, PARAMS)),
        jax.tree.leaves(exact),
        strict=True,
    ):
        scales = np.where(MASK, np.asarray(scales, np.float64), 0)
        expected = np.tensordot(scales, np.asarray(leaf, np.float64), 1)
        np.testing.assert_allclose(a, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


def stacked(**leaves):
    return StackedGrads(leaves, jnp.ones(len(leaves["a"]), bool))


def test_a_zero_leaves_out_one_group_of_one_example_only():
    grads = stacked(a=jnp.array([[1.0, math.nan], [2.0, 3.0]]), b=jnp.array([[4.0], [5.0]]))
    total = grads.weighted_sum({"a": jnp.array([0.0, 1.0]), "b": jnp.array([0.5, 1.0])})
    np.testing.assert_array_equal(total["a"], [2.0, 3.0])
    np.testing.assert_array_equal(total["b"], [7.0])


def forms_of_two_examples():
    forms = [stacked(a=jnp.ones((2, 3)), b=jnp.ones((2, 3)))]
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    for size in (None, 1):
        grads_fn = dpoptax.per_example_grads(
            lambda p, x: jnp.sum(p["a"] * x) * jnp.sum(p["b"]), microbatch_size=size
        )
        forms.append(grads_fn(params, jnp.ones((2, 3))))
    return forms


ONE_NUMBER_PER_EXAMPLE = r"shape \(2,\), one number per example; got"


def test_weights_that_fit_neither_tree_nor_batch_are_refused():
    ones = jnp.ones(2)
    for grads in forms_of_two_examples():
        for wrong in (
            {"a": ones},
            {"a": ones, "c": ones},
            [ones, ones],
            {"a": ones, "b": {"x": ones}},
        ):
            with pytest.raises(ValueError, match=r"weights must be one array .*, or a tree prefix"):
                grads.weighted_sum(wrong)
        with pytest.raises(ValueError, match=ONE_NUMBER_PER_EXAMPLE):
            grads.weighted_sum(jnp.ones(3))


@pytest.mark.untyped
def test_weights_of_a_shape_that_fits_no_batch_are_refused():
    for grads in forms_of_two_examples():
        for wrong in (jnp.ones(()), jnp.ones((2, 1)), {"a": jnp.ones(2), "b": jnp.ones(3)}):
            with pytest.raises(ValueError, match=ONE_NUMBER_PER_EXAMPLE):
                grads.weighted_sum(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["factored", "recomputed", "microbatched"])
def test_a_rule_with_groups_needs_no_further_pass(form):
    """The FLOPs of the step that XLA compiles, against those of the flat rule."""

    def flops(rule):
        def step(params, examples):
            grads = registry.FORMS[form](loss)(params, examples, mask=MASK)
            return grads.clip_and_sum(rule.weights)

        lowered = jax.jit(step).lower(PARAMS, EXAMPLES)
        return lowered.cost_analysis()["flops"], len(re.findall(r"dot_general", lowered.as_text()))

    flat, num_products = flops(dpoptax.clipping.FlatClip(1.0))
    groups, num_products_of_groups = flops(dpoptax.clipping.PerLayerClip(1.0))
    assert groups <= 1.02 * flat
    assert num_products_of_groups == num_products
