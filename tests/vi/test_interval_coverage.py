"""The table of "Can I trust the intervals?" for the hardest model: groups of unknown scale."""

import jax
import pytest

from reproduce.intervals import check, hierarchical


@pytest.mark.nightly
@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_intervals_of_a_hierarchical_model_cover(epsilon):
    with jax.numpy_dtype_promotion("standard"):
        found = check(hierarchical, epsilon, None, num_worlds=20, seed=7)
    assert abs(found["coverage"] - 0.9) <= 0.04 + 2 * found["standard_error"]
    assert found["width_ratio"] < 1.5
    # The guide's own intervals do not.
    assert found["guide_coverage"] < 0.8
