"""The distribution of Poisson batches against the exact one, with fixed keys."""

import math

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
    # Small batches of few examples are drawn by Floyd's algorithm, others by a permutation.
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


def test_truncation_keeps_a_uniform_subset():
    sampler = Poisson(20, 6, max_batch_size=4)
    table = draw(sampler, 20_000)
    sizes = table.sum(1)
    binomial = scipy.stats.binom(20, 0.3)
    assert sizes.max() == 4
    assert abs(np.mean(sizes == 4) - binomial.sf(3)) < 4 * math.sqrt(
        binomial.sf(3) * binomial.cdf(3) / 20_000
    )
    assert single_p_value(table, sizes.mean() / 20) > LEVEL


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
