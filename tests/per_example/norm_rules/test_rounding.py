"""Upper bounds on squared norms."""

import jax.numpy as jnp
import numpy as np

from dpoptax.per_example._norm_rules.matmul import gram_squared_norms
from dpoptax.per_example._norm_rules.rounding import ROUNDING, SPREAD, round_up, sum_of_squares

EPS = float(np.finfo(np.float32).eps)


def test_the_bound_is_the_documented_formula():
    sums, sizes = jnp.asarray([2.0, -1e-3]), jnp.asarray([1e3, 1e3])
    expected = [2 + ROUNDING * EPS * 1e3 + (SPREAD * EPS * 1e4) ** 2 * 1e3]
    bounds = round_up(sums, sizes, 10_000)
    np.testing.assert_allclose(bounds, [expected[0], expected[0] - 2], rtol=1e-5)


def test_the_bound_changes_no_norm_whose_terms_do_not_cancel():
    np.testing.assert_allclose(round_up(jnp.ones(1), jnp.ones(1), 100), 1, rtol=1e-6)


def test_squares_that_underflow_are_not_lost():
    tiny = jnp.full((2, 3), 1e-30)
    sums = np.asarray(sum_of_squares(tiny, (1,)), np.float64)
    assert np.all(sums >= 3e-60)
    assert np.all(sums <= 4 * np.finfo(np.float32).tiny)


def test_a_gram_product_of_cancelling_terms_is_at_least_the_exact_norm():
    rng = np.random.default_rng(0)
    a = np.repeat(rng.normal(size=(1, 64)), 16, axis=0).astype(np.float32)
    g = rng.normal(size=(16, 32))
    g = (g - g.mean(axis=0) + 1e-5 * rng.normal(size=32)).astype(np.float32)
    exact = np.sum((a.T.astype(np.float64) @ g.astype(np.float64)) ** 2)
    bound = gram_squared_norms(jnp.asarray(a @ a.T), jnp.asarray(g @ g.T))
    assert float(bound) >= exact
