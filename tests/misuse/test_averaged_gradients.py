"""Misuse: gradients that are averaged or summed, in place of per-example gradients.

One row of an average depends on every example, so a clip per row bounds nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax import clipping, mechanisms
from dpoptax.per_example._stacked import as_per_example_grads

PARAMS = {"w": jnp.zeros((8, 3)), "b": jnp.zeros(8), "scale": jnp.zeros(())}
SHAPES = "got the shapes of the parameters.*per_example_grads"


def updated(grads, params):
    tx = dpoptax.privatize(1.0, 1.0, expected_batch_size=8, key=jax.random.key(0))
    return jax.eval_shape(tx.update, grads, tx.init(params), params)


@pytest.mark.parametrize("grads", [jnp.ones(8), jnp.ones((8, 3)), {"w": jnp.ones((8, 3))}])
def test_an_update_without_parameters_is_refused(grads):
    """Eight averaged numbers could be those of eight examples."""
    tx = dpoptax.privatize(1.0, 1.0, expected_batch_size=8, key=jax.random.key(0))
    state = tx.init(jax.tree.map(jnp.zeros_like, grads))
    with pytest.raises(ValueError, match=r"expected the parameters.*got None.*tx\.update\(grads,"):
        tx.update(grads, state)


@pytest.mark.parametrize("names", [["w"], ["b"], ["scale"], ["w", "b"], ["w", "b", "scale"]])
def test_gradients_with_the_shapes_of_the_parameters_are_refused(names):
    params = {name: PARAMS[name] for name in names}
    for mean in (params, jax.grad(lambda p: sum(map(jnp.sum, jax.tree.leaves(p))))(params)):
        with pytest.raises(ValueError, match=SHAPES):
            updated(mean, params)


def test_each_leaf_must_have_an_example_axis():
    per_example = jax.tree.map(lambda leaf: jnp.ones((8, *leaf.shape)), PARAMS)
    updated(per_example, PARAMS)
    for name, leaf in PARAMS.items():
        with pytest.raises(ValueError, match=r"leading batch axis|must have shape"):
            updated(per_example | {name: leaf}, PARAMS)
    with pytest.raises(ValueError, match="same tree structure"):
        updated(per_example["w"], PARAMS)


def test_what_a_refusal_prevents():
    """Taken for two examples, an average moves by more than the clip when an example joins."""
    rule = clipping.FlatClip(1.0)

    def total(examples):
        mean = examples.mean(0)  # shape (2,), as a per-example gradient of a scalar for two
        grads = as_per_example_grads(mean)
        return mechanisms.Gaussian().release(jax.random.key(0), grads, rule, 0.0, 0)

    one = jnp.array([[-5.0, -5.0]])
    two = jnp.concatenate([one, jnp.array([[50.0, 50.0]])])
    assert np.abs(total(two) - total(one)) > 2 * rule.sensitivity("add_or_remove_one") - 1e-6
