"""The distribution of Poisson batches against the exact one, with fixed keys."""

import numpy as np
import pytest
import scipy.stats
from inclusion import (
    LEVEL,
    draw,
    pair_p_value,
    single_p_value,
    size_p_value,
    succession_p_value,
)

from dpoptax.samplers import Poisson

# What the tests of this file share is computed by one worker.
pytestmark = pytest.mark.xdist_group("inclusion tables")

P_VALUES = {
    "sizes": size_p_value,
    "singles": single_p_value,
    "pairs": pair_p_value,
    "succession": succession_p_value,
}


@pytest.mark.parametrize("p_value", P_VALUES.values(), ids=P_VALUES)
@pytest.mark.parametrize(
    ("num_examples", "expected", "most"),
    # Batches of up to half of the examples are drawn one by one, others by a permutation.
    [
        (3, 1, 3),
        (10, 2.5, 10),
        (60, 3, 15),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((2, 1, 2), (100, 8, 100), (400, 9, 40), (1000, 20, 100))
        ),
    ],
)
def test_batches_include_each_example_independently(p_value, num_examples, expected, most):
    sampler = Poisson(num_examples, expected, max_batch_size=most)
    table = draw(sampler, 20_000)
    assert p_value(table, sampler.sampling_rate) > LEVEL


def test_the_default_max_batch_size_changes_nothing():
    sampler = Poisson(1000, 20)
    table = draw(sampler, 5_000)
    assert 20 < sampler.max_batch_size < 100
    assert table.sum(1).max() < sampler.max_batch_size
    assert size_p_value(table, 0.02) > LEVEL
    assert single_p_value(table, 0.02) > LEVEL


def size_of_limited_batches_p_value(table, rate, largest):
    """Chi-square of the batch sizes against the binomial distribution below the limit."""
    sizes = np.arange(largest + 1)
    expected = scipy.stats.binom.pmf(sizes, table.shape[1], rate)
    observed = np.bincount(table.sum(1), minlength=largest + 1)
    return scipy.stats.chisquare(observed, len(table) * expected / expected.sum()).pvalue


@pytest.mark.parametrize(("num_examples", "largest"), [(20, 4), (600, 5)])
def test_large_batches_are_drawn_again(num_examples, largest):
    sampler = Poisson(num_examples, 6, max_batch_size=largest)
    table = draw(sampler, 20_000)
    assert table.sum(1).max() == largest
    rate = sampler.sampling_rate
    assert size_of_limited_batches_p_value(table, rate, largest) > LEVEL
    assert single_p_value(table, table.mean()) > LEVEL


def test_batches_that_are_cut_would_fail():
    rng = np.random.default_rng(0)
    independent = rng.random((20_000, 20)) < 0.3
    cut = independent & (np.argsort(np.argsort(rng.random((20_000, 20)) - independent)) < 4)
    assert size_of_limited_batches_p_value(cut, 0.3, 4) < 1e-12


def test_a_sampler_that_drops_the_highest_rows_would_fail():
    """The tests above have power: they detect the most common mistakes."""
    rng = np.random.default_rng(0)
    independent = rng.random((20_000, 20)) < 0.3
    lowest = independent & (np.cumsum(independent, 1) <= 4)
    assert single_p_value(lowest, lowest.mean()) < 1e-12
    fixed_size = np.argsort(rng.random((20_000, 20)), 1) < 6
    assert size_p_value(fixed_size, 0.3) < 1e-12
    assert pair_p_value(np.repeat(independent[:, :10], 2, 1), 0.3) < 1e-12
    assert succession_p_value(np.repeat(independent[::2], 2, 0), 0.3) < 1e-12
    off_by_5_percent = rng.random((20_000, 20)) < 0.315
    assert single_p_value(off_by_5_percent, 0.3) < LEVEL
    assert size_p_value(off_by_5_percent, 0.3) < LEVEL


def test_everyone_takes_part_at_rate_one():
    sampler = Poisson(7, 7)
    assert sampler.max_batch_size == 7
    assert draw(sampler, 50).all()
