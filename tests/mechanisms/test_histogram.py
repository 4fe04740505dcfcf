"""The norm histogram: exact without noise, sensitivity one, and noise of the stated scale."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax.clipping import FlatClip
from dpoptax.mechanisms import norm_histogram
from dpoptax.training._diagnostics import nonprivate_norms

EDGES = (0.0, 0.5, 1.0, 4.0)
NORMS = np.array([0.1, 0.49, 0.5, 0.9, 3.0, 100.0, 0.0], np.float32)
GRADS = {"w": jnp.asarray(NORMS)[:, None] * jnp.array([0.6, 0.8])}


def test_counts_are_those_of_numpy():
    found = norm_histogram(GRADS, EDGES, 0.0, jax.random.key(0))
    expected, _ = np.histogram(NORMS, [*EDGES, np.inf])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.seconds
def test_padding_and_non_finite_norms_are_not_counted():
    data = jnp.array([[1.0], [jnp.nan], [jnp.inf], [2.0]])
    grads = dpoptax.per_example_grads(lambda w, x: jnp.sum(w * x))(
        jnp.zeros(1), data, mask=jnp.array([True, True, True, False])
    )
    found = norm_histogram(grads, EDGES, 0.0, jax.random.key(0))
    np.testing.assert_array_equal(found, [0, 0, 1, 0])


@pytest.mark.seconds
def test_one_example_moves_it_by_one():
    base = norm_histogram(GRADS, EDGES, 0.0, jax.random.key(0))
    for norm in (0.0, 0.7, 1e6):
        more = {"w": jnp.concatenate([GRADS["w"], jnp.array([[norm, 0.0]])])}
        moved = norm_histogram(more, EDGES, 0.0, jax.random.key(0)) - base
        assert float(jnp.linalg.norm(moved)) == 1.0


@pytest.mark.slow
def test_noise_has_the_stated_deviation():
    n = 4000
    draws = jax.vmap(lambda key: norm_histogram(GRADS, EDGES, 3.0, key))(
        jax.random.split(jax.random.key(1), n)
    )
    noise = draws - norm_histogram(GRADS, EDGES, 0.0, jax.random.key(0))
    assert abs(float(noise.std()) / 3 - 1) < 4.5 / math.sqrt(2 * 4 * n)


def test_two_releases_of_one_draw_cost_more_than_of_two():
    """This is why a histogram of the batch of a step is charged together with the step."""
    sampler = dpoptax.samplers.Poisson(1000, 10)

    def epsilon(*noise):
        ledger = dpoptax.accounting.Ledger(sampler, clip=1.0, delta=1e-5)
        for value in noise:
            ledger.charge(value)
        return ledger.epsilon()

    assert epsilon((1 / 0.8**2 + 1 / 0.9**2) ** -0.5) > 1.1 * epsilon(0.8, 0.9)


@pytest.mark.parametrize(
    "edges", [(), (0.1, 1.0), (0.0, 1.0, 1.0), (0.0, 2.0, 1.0), (0.0, math.nan)]
)
def test_bad_edges_are_refused(edges):
    with pytest.raises(ValueError, match="edges must increase from 0"):
        norm_histogram(GRADS, edges, 1.0, jax.random.key(0))


def test_diagnostics_count_non_finite_gradients_as_clipped():
    data = jnp.array([[0.5], [jnp.inf], [3.0], [9.0]])
    grads = dpoptax.per_example_grads(lambda w, x: jnp.sum(w * x))(
        jnp.zeros(1), data, mask=jnp.array([True, True, True, False])
    )
    share, median = nonprivate_norms(grads, FlatClip(1.0))
    np.testing.assert_allclose([share, median], [2 / 3, 3.0], rtol=1e-6)
    nobody = dpoptax.per_example_grads(lambda w, x: jnp.sum(w * x))(
        jnp.zeros(1), data, mask=jnp.zeros(4, bool)
    )
    assert np.isnan(nonprivate_norms(nobody, FlatClip(1.0))).all()
