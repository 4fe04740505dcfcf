"""Batches, keys, noise and small functions under the names of d3p."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpoptax.accounting import epsilon
from dpoptax.compat import d3p
from dpoptax.compat.d3p import poisson_batchify_data, q_to_batch_size, subsample_batchify_data
from dpoptax.compat.d3p._laws import law_of
from dpoptax.compat.d3p.minibatch import batch_size_to_q, split_batchify_data
from dpoptax.samplers import FixedSize, Poisson, Shuffled

DATA = (jnp.arange(1000), 2 * jnp.arange(1000))


@pytest.mark.seconds
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
    assert batch_size_to_q(29, 100) == 0.29
    with pytest.raises(ValueError, match=r"above 0 and at most 1; got 29\..* pass q = b"):
        q_to_batch_size(29, 100)
    with pytest.raises(TypeError, match="give either batch_size or q"):
        subsample_batchify_data(DATA)
    with pytest.raises(ValueError, match=r"q=0.0001 of 1000 examples.* Pass at least q=0.001"):
        poisson_batchify_data(DATA, q=0.0001)


@pytest.mark.seconds
def test_an_epoch_of_split_data_has_each_example_at_most_once():
    init, get_batch = split_batchify_data((jnp.arange(25),), batch_size=10, return_mask=True)
    num_batches, state = init(rng_key=d3p.random.PRNGKey(0))
    assert num_batches == 2
    (first,), mask = get_batch(0, state)
    (second,), _ = get_batch(1, state)
    assert len({*first.tolist(), *second.tolist()}) == 20
    assert mask.shape == (10,)
    assert mask.all()
    _, other = init(rng_key=d3p.random.PRNGKey(1))
    assert get_batch(0, other)[0][0].tolist() != first.tolist()


@pytest.mark.seconds
def test_a_part_of_the_batches_as_size_leaves_room_for_all_of_them():
    """d3p truncates 1 % of the batches at .99, which its epsilon leaves out."""
    init, get_batch = poisson_batchify_data(DATA, 0.1, 0.99, "suppress", d3p.random)
    batch, mask = get_batch(0, init(d3p.random.PRNGKey(0))[1])
    assert batch[0].sampler == Poisson(1000, 100)
    assert mask.shape[0] >= 124  # the .99 quantile
    run = {"noise_multiplier": 1.0, "num_steps": 100, "delta": 1e-4}
    unlimited = Poisson(1000, 100, max_batch_size=1000)
    ours = epsilon(sampler=batch.sampler, **run)
    assert ours == pytest.approx(epsilon(sampler=unlimited, **run), rel=1e-4)
    with pytest.warns(UserWarning, match="costs more epsilon than q says"):
        init, get_batch = poisson_batchify_data(DATA, 0.1, 110)
    limited = get_batch(0, init(d3p.random.PRNGKey(0))[1])[0].sampler
    assert limited.max_batch_size == 110
    assert epsilon(sampler=limited, **run) > 1.03 * ours


@pytest.mark.untyped
def test_what_has_no_epsilon_is_refused_by_name():
    with pytest.raises(ValueError, match="with_replacement=True draws an example several times"):
        subsample_batchify_data(DATA, 10, with_replacement=True)
    with pytest.raises(ValueError, match="'truncate' or 'suppress'; got"):
        poisson_batchify_data(DATA, 0.1, handle_oversized_batch="split")
    for function in (subsample_batchify_data, split_batchify_data):
        with pytest.raises(TypeError, match=r"rng_suite must be .*; got jax\.random"):
            function(DATA, 10, rng_suite=jax.random)
        function(DATA, 10, rng_suite=d3p.random.debug)


@pytest.mark.seconds
def test_batches_remember_how_they_were_drawn():
    key = d3p.random.PRNGKey(0)
    for function, law in (
        (subsample_batchify_data, FixedSize(1000, 30)),
        (split_batchify_data, Shuffled(990, 30)),
    ):
        init, get_batch = function(DATA, 30)
        state = init(key)[1]
        batch = get_batch(0, state)
        assert law_of(batch) == law
        assert law_of([batch[0] + 0, batch[1]]) is None

        @jax.jit
        def traced(state, get_batch=get_batch, law=law):
            batch = get_batch(1, state)
            assert law_of(batch) == law
            return batch

        assert law_of(traced(state)) is None
    init, get_batch = poisson_batchify_data(DATA, 0.03)
    batch, _ = jax.jit(get_batch)(0, init(key)[1])
    assert law_of(batch) == law_of(list(batch)) == Poisson(1000, 30)


@pytest.mark.seconds
def test_keys_of_three_kinds_draw():
    """An old key is the Threefry key with the same words."""
    old, new = jax.random.PRNGKey(7), jax.random.key(7)
    for function in (
        lambda key: d3p.random.uniform(key, (3,)),
        lambda key: d3p.random.normal(d3p.random.fold_in(key, 3), (3,)),
        lambda key: d3p.random.randint(d3p.random.split(key)[0], (9,), 0, 5),
        lambda key: d3p.util.sample_from_array(key, jnp.arange(9), 4, 0),
        lambda key: d3p.random.random_bits(d3p.random.convert_to_jax_rng_key(key), 8, (4,)),
    ):
        np.testing.assert_array_equal(function(old), function(new))
    assert d3p.random.PRNGKey(0).dtype == d3p.random.PRNGKey(bytes(32)).dtype
    assert d3p.random.PRNGKey() != d3p.random.PRNGKey()
    assert d3p.random.debug.PRNGKey(7) == new
    assert d3p.random.debug.convert_to_jax_rng_key(old) == new
    with pytest.raises(ValueError, match="1 to 32 bytes; got 33"):
        d3p.random.PRNGKey(bytes(33))
    with pytest.raises(ValueError, match="bit_width must be"):
        d3p.random.random_bits(old, 7, ())


@pytest.mark.slow
def test_noise_is_enough_for_the_batches_it_is_computed_for():
    """d3p's own numbers: 2.3644 for both kinds of batches, and 1.4146 for one example more."""
    setting = {"q": 0.01, "num_iter": 1000}
    sigma, eps, _ = d3p.dputil.approximate_sigma(1.0, 1e-5, **setting, force_smaller=True)
    run = {"noise_multiplier": float(sigma), "num_steps": 1000, "delta": 1e-5}
    assert 0.99 < eps <= 1
    for sampler in (FixedSize(5000, 50), Poisson(5000, 50)):
        assert epsilon(sampler=sampler, relation="replace_one", **run) <= 1
    # What d3p returns is enough for Poisson batches, and not for batches of a fixed size.
    run["noise_multiplier"] = 2.3644257541906986
    poisson, fixed = (
        epsilon(sampler=sampler, relation="replace_one", **run)
        for sampler in (Poisson(5000, 50), FixedSize(5000, 50))
    )
    assert poisson == pytest.approx(1, rel=1e-3)
    assert fixed > 1.3
    removed, _, _ = d3p.dputil.approximate_sigma_remove_relation(1.0, 1e-5, **setting)
    assert removed == pytest.approx(1.4146224689868294, rel=1e-3)
    with pytest.raises(ValueError, match="q is a sampling rate"):
        d3p.dputil.approximate_sigma(1.0, 1e-5, 10.0, 100)


def test_small_functions_answer_as_d3p():
    util = d3p.util
    assert [util.is_scalar(x) for x in (1, 1.5, np.ones((1, 1)), np.ones(2))] == [1, 1, 1, 0]
    assert [util.is_integer(x) for x in (1, 1.5, np.ones(2), np.ones(2, int))] == [1, 0, 0, 1]
    assert jax.jit(lambda x: jnp.asarray(util.is_int_scalar(x)))(3)
    assert util.unvectorize_shape(np.ones((2, 3)), 4) == (1, 1, 2, 3)
    assert util.example_count(np.ones((4, 2))) == 4
    array = np.arange(24.0).reshape(4, 3, 2)
    np.testing.assert_allclose(util.map_over_secondary_dims(jnp.sum)(array), array.sum(0))
    with pytest.raises(ValueError, match="at most the length of the axis, 3; got 4"):
        util.sample_from_array(jax.random.key(0), np.arange(3), 4, 0)
