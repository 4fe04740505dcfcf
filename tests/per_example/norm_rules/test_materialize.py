"""Materialized gradients: the rule for every kind of site, and the reference for the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rule_laws import BATCH, check_laws, floats, ids, random_factors, sites_of

from dpoptax.per_example._norm_rules.materialize import Materialize, materialization_cost


def convolution(w, x):
    return jnp.sum(jnp.tanh(jax.lax.conv_general_dilated(x[None], w, (1, 1), "SAME")))


@pytest.mark.parametrize(
    ("loss_fn", "shape", "example"),
    [
        (lambda w, x: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w.T)), (4, 3), floats(2, 4)),
        (lambda w, x: jnp.sum(jnp.tanh(x + w)), (3,), floats(5, 3)),
        (lambda w, i: jnp.sum(jnp.tanh(w[i, i])), (4, 4), ids(5)),
        (lambda w, x: convolution(w, x) + convolution(w, 2 * x), (3, 2, 3, 3), floats(2, 5, 4)),
    ],
    ids=["two uses", "addition", "numbers", "convolutions"],
)
def test_it_obeys_the_laws_for_sites_of_any_kind(loss_fn, shape, example):
    check_laws(Materialize.matches(*sites_of(loss_fn, shape, example)))


def test_its_gradients_are_inputs_times_cotangents():
    """The other tests compare with this rule, so this one compares with numpy."""
    sites, spec = sites_of(lambda w, x: jnp.sum(jnp.tanh(x @ w)), (4, 3), floats(2, 4))
    ((operands, cotangent),) = factors = random_factors(sites, 4)
    expected = np.einsum("btk,btn->bkn", np.asarray(operands[0], np.float64), cotangent)
    rule = Materialize.matches(sites, spec)
    np.testing.assert_allclose(rule.gradients(factors), expected, rtol=1e-5, atol=1e-6)
    assert expected.shape == (BATCH, 4, 3)


def test_the_cost_counts_the_multiplications_of_one_gradient():
    use = sites_of(lambda w, x: jnp.sum(jnp.tanh(x @ w)), (4, 3), floats(2, 4))
    assert materialization_cost(*use) == 4 * 3 * 2
    assert Materialize.matches(*use).cost > materialization_cost(*use)
