"""What every sampler must do, and the distribution of each one."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry
import scipy.stats
from inclusion import LEVEL, draw, single_p_value, size_p_value, succession_p_value

from dpoptax import samplers

every_sampler = pytest.mark.parametrize("make", registry.SAMPLERS.values(), ids=registry.SAMPLERS)


def loop(sampler, state, length, compiled=True):
    sample = jax.jit(sampler.sample) if compiled else sampler.sample
    batches = []
    for _ in range(length):
        state, batch = sample(state)
        batches.append(batch)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


def assert_same(batches, others):
    assert isinstance(batches, samplers.Batch)
    jax.tree.map(np.testing.assert_array_equal, batches, others)


@pytest.mark.slow
@every_sampler
def test_jit_equals_eager_scan_equals_loop_vmap_equals_loop(make):
    sampler = make(50, 5)
    eager = loop(sampler, sampler.init(jax.random.key(1)), 3, compiled=False)
    looped = loop(sampler, sampler.init(jax.random.key(1)), 12)
    _, scanned = jax.lax.scan(
        lambda s, _: sampler.sample(s), sampler.init(jax.random.key(1)), None, length=12
    )
    assert_same(looped, scanned)
    assert_same(eager, jax.tree.map(lambda leaf: leaf[:3], looped))
    keys = jax.random.split(jax.random.key(2), 3)
    mapped = jax.vmap(lambda key: sampler.sample(sampler.init(key))[1])(keys)
    looped = [jax.jit(sampler.sample)(sampler.init(key))[1] for key in keys]
    assert_same(mapped, jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped))


@pytest.mark.slow
@every_sampler
def test_a_run_resumes_at_any_step_and_the_host_sees_the_same_batches(make):
    sampler = make(50, 5)
    whole = loop(sampler, sampler.init(jax.random.key(1)), 14)
    rest = loop(sampler, sampler.init(jax.random.key(1), step=3), 11)
    assert_same(jax.tree.map(lambda leaf: leaf[3:], whole), rest)
    host = list(itertools.islice(samplers.iterate_batches(sampler, jax.random.key(1), step=7), 5))
    assert isinstance(host[0].indices, np.ndarray)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *host)
    assert_same(stacked, jax.tree.map(lambda leaf: np.asarray(leaf)[7:12], whole))


@every_sampler
def test_batches_have_static_shape_distinct_members_and_zeros_where_masked(make):
    sampler = make(50, 5)
    batches = loop(sampler, sampler.init(jax.random.key(5)), 30)
    assert batches.indices.shape == batches.mask.shape == (30, sampler.max_batch_size)
    assert batches.indices.dtype == jnp.int32
    assert batches.mask.dtype == bool
    assert np.all(batches.indices[~batches.mask] == sampler.num_examples)
    for indices, mask in zip(*map(np.asarray, batches), strict=True):
        assert len(np.unique(indices[mask])) == mask.sum()
        assert np.all((indices[mask] >= 0) & (indices[mask] < sampler.num_examples))


@pytest.mark.slow
@every_sampler
def test_other_keys_and_other_steps_give_other_batches(make):
    sampler = make(1000, 5)
    batches = [
        loop(sampler, sampler.init(jax.random.key(seed)), 20).indices.tolist() for seed in range(3)
    ]
    rows = {tuple(row) for rows in batches for row in rows}
    assert len(rows) == 60


LARGE = {
    "poisson": samplers.Poisson(10**9, 128),
    "fixed size": samplers.FixedSize(10**9, 128),
    "shuffled": samplers.Shuffled(10**9, 128),
    "cyclic": samplers.CyclicPoisson(10**9, 128, 7),
}


def sizes_of(jaxpr):
    for eqn in jaxpr.eqns:
        for variable in eqn.outvars:
            yield math.prod(variable.aval.shape)
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes_of(inner)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", LARGE.values(), ids=LARGE)
def test_no_array_is_as_long_as_the_data(sampler):
    state = sampler.init(jax.random.key(0))
    sizes = list(sizes_of(jax.make_jaxpr(sampler.sample)(state).jaxpr))
    assert len(sizes) > 20
    assert max(sizes) <= 4 * sampler.max_batch_size
    _, batch = jax.jit(sampler.sample)(state)
    assert int(batch.indices.max()) > 5e8


@pytest.mark.slow
@pytest.mark.parametrize(("num_examples", "size"), [(2, 1), (3, 2), (10, 4), (600, 12)])
def test_fixed_size_batches_are_uniform_subsets(num_examples, size):
    sampler = samplers.FixedSize(num_examples, size)
    table = draw(sampler, 20_000)
    assert np.all(table.sum(1) == size)
    # Without replacement the counts vary less, by this factor.
    counts, rate = table.sum(0), size / num_examples
    statistic = np.sum((counts - 20_000 * rate) ** 2) / (20_000 * rate * (1 - rate))
    assert (
        scipy.stats.chi2.sf(statistic * (num_examples - 1) / num_examples, num_examples - 1) > LEVEL
    )
    pairs = (table.T.astype(np.float32) @ table.astype(np.float32))[
        np.triu_indices(num_examples, 1)
    ]
    both = rate * (size - 1) / (num_examples - 1)
    if both > 0:
        worst = np.abs(pairs - 20_000 * both).max() / math.sqrt(20_000 * both * (1 - both))
        assert 2 * len(pairs) * scipy.stats.norm.sf(worst) > LEVEL
    assert succession_of_full_batches(table, size) > LEVEL


def succession_of_full_batches(table, size):
    """How many members two batches in a row share, against the hypergeometric distribution."""
    num_examples = table.shape[1]
    shared = np.sum(table[1:] & table[:-1], axis=1)
    rate = size / num_examples
    variance = size * rate * (1 - rate) * (num_examples - size) / (num_examples - 1)
    deviation = abs(shared.mean() - size * rate) / math.sqrt(variance / len(shared))
    return 2 * scipy.stats.norm.sf(deviation)


def test_shuffled_epochs_show_everyone_once():
    sampler = samplers.Shuffled(13, 4)
    table = draw(sampler, 4 * 5_000).reshape(5_000, 4, 13)
    assert np.all(table.sum(1) == 1)
    np.testing.assert_array_equal(table.sum(2), np.tile([4, 4, 4, 1], (5_000, 1)))
    for number in range(4):
        assert single_p_value(table[:, number], table[:, number].mean()) > LEVEL
    again = np.mean(table[1:, 0] & table[:-1, 0]) / (4 / 13) ** 2
    assert abs(again - 1) < 0.05


def test_balls_in_bins_show_everyone_once_per_round_independently():
    sampler = samplers.BallsInBins(40, 5)
    table = draw(sampler, 5 * 4_000).reshape(4_000, 5, 40)
    assert np.all(table.sum(1) == 1)
    for number in range(5):
        assert size_p_value(table[:, number], 1 / 5) > LEVEL
        assert single_p_value(table[:, number], 1 / 5) > LEVEL
        assert succession_p_value(table[:, number], 1 / 5) > LEVEL


def test_truncated_balls_sit_out_at_random():
    sampler = samplers.BallsInBins(40, 5, max_batch_size=6)
    table = draw(sampler, 20_000)
    assert table.sum(1).max() == 6
    assert single_p_value(table, table.mean()) > LEVEL


@pytest.mark.slow
@pytest.mark.parametrize("num_examples", [40, 43])
def test_cyclic_batches_are_poisson_batches_of_their_group(num_examples):
    sampler = samplers.CyclicPoisson(num_examples, 4, 5)
    table = draw(sampler, 20_000)
    rate = sampler.sampling_rate
    for group in range(5):
        own = np.arange(num_examples) % 5 == group
        turns = table[group::5]
        assert not turns[:, ~own].any()
        assert size_p_value(turns[:, own], rate) > LEVEL
        assert single_p_value(turns[:, own], rate) > LEVEL


@pytest.mark.slow
@pytest.mark.parametrize(("num_examples", "expected", "groups"), [(10, 1, 3), (43, 43 / 5, 5)])
def test_cyclic_groups_may_expect_less_than_one_or_take_everyone(num_examples, expected, groups):
    sampler = samplers.CyclicPoisson(num_examples, expected, groups)
    table = draw(sampler, 6_000)
    for group in range(groups):
        own = np.arange(num_examples) % groups == group
        counts = table[group::groups][:, own].sum()
        trials, rate = table[group::groups][:, own].size, sampler.sampling_rate
        assert abs(counts - trials * rate) <= 4 * math.sqrt(trials * rate * (1 - rate))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Poisson", "FixedSize", "Shuffled"])
def test_the_largest_number_of_examples_fits(name):
    sampler = getattr(samplers, name)(2**31 - 1, 64)
    batch = loop(sampler, sampler.init(jax.random.key(0), step=1), 2)
    assert np.all(batch.indices >= 0)
    assert batch.mask.sum() > 0


def test_users_have_all_their_examples_up_to_the_maximum():
    ids = np.array(["c", "a", "b", "a", "c", "a", "c", "c"])
    sampler = samplers.UserPoisson(ids, expected_batch_size=2, max_examples_per_user=3)
    rows, mask = sampler.arrange({"x": jnp.arange(10.0, 18.0), "i": jnp.arange(16).reshape(8, 2)})
    np.testing.assert_array_equal(rows["x"], [[11, 13, 15], [12, 0, 0], [10, 14, 16]])
    np.testing.assert_array_equal(mask, [[True] * 3, [True, False, False], [True] * 3])
    assert rows["i"].shape == (3, 3, 2)
    assert sampler.num_examples == 3
    assert sampler.event(1.0, 5) == samplers.Poisson(3, 2).event(1.0, 5)
    table = draw(sampler, 10_000)
    assert size_p_value(table, sampler.sampling_rate) > LEVEL


def test_the_inclusion_tests_would_notice_a_correlated_sampler():
    rng = np.random.default_rng(1)
    bins = np.repeat(rng.integers(5, size=(4_000, 20)), 2, axis=1)  # twins share their bin
    table = bins == 0
    assert size_p_value(table, 1 / 5) < 1e-12
