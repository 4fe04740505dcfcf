"""The names of d3p: batches with a fixed size, and Poisson batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpoptax.compat.d3p import poisson_batchify_data, q_to_batch_size, subsample_batchify_data

DATA = (jnp.arange(1000), 2 * jnp.arange(1000))


def test_a_fixed_size_is_drawn_without_replacement_and_rows_stay_together():
    init, get_batch = subsample_batchify_data(DATA, q=0.1)
    num_batches, state = init(jax.random.key(0))
    assert num_batches == 10
    first, second = jax.vmap(lambda i: get_batch(i, state))(jnp.arange(50))
    assert first.shape == (50, 100)
    np.testing.assert_array_equal(second, 2 * first)
    assert all(len(np.unique(row)) == 100 for row in np.asarray(first))
    assert len({tuple(sorted(row)) for row in np.asarray(first).tolist()}) == 50


@pytest.mark.slow
def test_poisson_batches_come_with_a_mask():
    init, get_batch = poisson_batchify_data(DATA, q=0.05)
    num_batches, state = init(jax.random.key(1))
    assert num_batches == 20
    (rows, _), mask = jax.jit(jax.vmap(lambda i: get_batch(i, state)))(jnp.arange(2000))
    sizes = np.asarray(mask.sum(1))
    assert abs(sizes.mean() - 50) < 4.5 * np.sqrt(1000 * 0.05 * 0.95 / 2000)
    assert abs(sizes.var() / (1000 * 0.05 * 0.95) - 1) < 4.5 * np.sqrt(2 / 2000)
    taken = np.asarray(rows.examples)[np.asarray(mask)]
    assert abs(taken.mean() / 499.5 - 1) < 0.02


def test_rates_become_the_nearest_size():
    assert [q_to_batch_size(q, n) for q, n in ((0.29, 100), (0.04, 90), (1, 7), (1e-9, 5))] == [
        29, 4, 7, 1,
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"above 0 and at most 1; got 29\..* pass q = b"):
        q_to_batch_size(29, 100)
    with pytest.raises(TypeError, match="give either batch_size or q"):
        subsample_batchify_data(DATA)
    with pytest.raises(ValueError, match=r"q=0.0001 of 1000 examples.* Pass at least q=0.001"):
        poisson_batchify_data(DATA, q=0.0001)
