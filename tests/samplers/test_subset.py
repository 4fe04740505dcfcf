"""Uniform samples without replacement: every sequence of draws is treated as the proof says."""

import collections
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from eight_devices import run_on_eight_devices

from dpoptax.random import insecure_key
from dpoptax.samplers import _subset as subset

LEVEL = 1e-4


@pytest.mark.parametrize("size", [1, 5, 2**16 - 1, 2**16, 2**16 + 1, 10**9 + 7, 2**31])
def test_a_draw_is_the_size_times_a_64_bit_fraction_rounded_down(size):
    key = jax.random.key(3)
    high, low = np.asarray(jax.random.bits(key, (2, 300), jnp.uint32)).astype(object)
    exact = [(int(h) * 2**32 + int(word)) * size >> 64 for h, word in zip(high, low, strict=True)]
    assert subset._uniform(key, size, 300).tolist() == exact


def outcomes(first_different, size=3, draws=4, count=2):
    """How often each sample comes, over all sequences of draws with enough different values."""
    found = collections.Counter()
    for values in itertools.product(range(size), repeat=draws):
        chosen, different = first_different(jnp.array(values, jnp.uint32), size, count)
        assert int(different) == len(set(values))
        if different >= count:
            found[tuple(chosen.tolist())] += 1
    return found


def test_over_all_sequences_of_draws_every_sample_comes_equally_often():
    found = outcomes(subset._first_different)
    assert sorted(found) == list(itertools.permutations(range(3), 2))
    assert len(set(found.values())) == 1


def test_to_take_the_lowest_values_would_fail():
    def lowest(values, size, count):
        del size
        different = np.unique(np.asarray(values))
        return np.resize(different, count), len(different)

    assert len(set(outcomes(lowest).values())) > 1


def test_both_ways_to_sort_find_the_same_values():
    draws, count = 300, 100
    values = jax.random.randint(jax.random.key(0), (draws,), 0, 150).astype(jnp.uint32)
    packed, many = subset._first_different(values, 150, count)
    apart, as_many = subset._first_different(values, 2**31, count)
    np.testing.assert_array_equal(packed, apart)
    assert int(many) == int(as_many) == len(set(values.tolist()))
    assert packed.tolist() == list(dict.fromkeys(values.tolist()))[:count]


@pytest.mark.parametrize("draws", [2**16, 2**16 - 1])
def test_values_and_places_fit_into_32_bits_at_the_limit(draws):
    size = 2**16  # times 2**16 draws, the product is 2**32
    values = jnp.full(draws, size - 1, jnp.uint32).at[-1].set(size - 2)
    chosen, different = subset._first_different(values, size, 2)
    assert (chosen.tolist(), int(different)) == ([size - 1, size - 2], 2)


@pytest.mark.parametrize("size", [2, 7, 1000, 60_000, 2**31])
@pytest.mark.parametrize("make_key", [jax.random.key, insecure_key])
def test_a_sample_has_different_numbers_in_range_and_depends_on_the_key(size, make_key):
    for count in {1, min(size // 2, 300), min(size, 300)}:
        sample = [
            np.asarray(subset.sample_without_replacement(make_key(seed), size, count))
            for seed in (0, 1)
        ]
        assert all(len(set(found.tolist())) == count for found in sample)
        assert all(found.min() >= 0 and found.max() < size for found in sample)
        assert size < 1000 or not np.array_equal(*sample)


@pytest.mark.parametrize(("size", "count"), [(2, 1), (40, 20), (1000, 30), (60_000, 1112)])
def test_enough_is_drawn_and_not_much_more(size, count):
    draws = subset._num_draws(size, count)
    drawn = np.random.default_rng(0).integers(size, size=(2000, draws))
    different = 1 + np.sum(np.diff(np.sort(drawn), axis=1) > 0, axis=1)
    assert different.min() >= count
    assert draws <= 1.5 * count + 8 * math.sqrt(count) + 20


def test_draws_that_do_not_suffice_are_repeated_and_stay_uniform(monkeypatch):
    monkeypatch.setattr(subset, "_num_draws", lambda size, count: count)
    # Three draws from six numbers are different with probability 5/9.
    keys = jax.random.split(jax.random.key(0), 12_000)
    drawn = jax.jit(jax.vmap(lambda key: subset.sample_without_replacement(key, 6, 3)))(keys)
    seen = collections.Counter(map(tuple, np.asarray(drawn).tolist()))
    assert len(seen) == math.perm(6, 3)
    assert scipy.stats.chisquare(list(seen.values())).pvalue > LEVEL


@pytest.mark.e2e
def test_keys_that_differ_by_device_draw_other_samples():
    """With one key per device inside `shard_map`, each device draws a sample of its own."""
    program = (
        "import jax, numpy as np\n"
        "from dpoptax.samplers._subset import sample_without_replacement\n"
        "mesh = jax.make_mesh((8,), ('d',), axis_types=(jax.sharding.AxisType.Auto,))\n"
        "rows = jax.sharding.PartitionSpec('d')\n"
        "draw = lambda keys: sample_without_replacement(keys[0], 400, 100)[None]\n"
        "draw = jax.jit(jax.shard_map(draw, mesh=mesh, in_specs=rows, out_specs=rows))\n"
        "samples = np.asarray(draw(jax.random.split(jax.random.key(0), 8)))\n"
        "print(len({tuple(sample) for sample in samples.tolist()}))"
    )
    assert run_on_eight_devices(program).split()[-1] == "8"
