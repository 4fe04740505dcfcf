"""The private attributes of dp-accounting mean what our adapter assumes.

Each test computes delta from what the adapter reads, and compares it with dp-accounting's public
answer. A version that renames an attribute or changes its meaning fails here.
"""

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from dpoptax.accounting._dp_accounting_compat import (
    GridLoss,
    distribution,
    from_deltas,
    grid_losses,
)

GRID = 1e-2
EPSILONS = np.linspace(-1.0, 3.0, 41)
ASYMMETRIC = pld.from_gaussian_mechanism(1.0, sampling_prob=0.2, value_discretization_interval=GRID)


def deltas_of(loss, epsilons):
    """The definition: infinite losses, and E max(0, 1 - exp(epsilon - loss)) over finite ones."""
    losses = GRID * (loss.lowest + np.arange(len(loss.probabilities)))
    excess = np.maximum(-np.expm1(epsilons[:, None] - losses), 0.0)
    return loss.infinite + excess @ loss.probabilities


@pytest.mark.parametrize(
    "theirs",
    [
        pld.from_gaussian_mechanism(1.0, value_discretization_interval=GRID),
        ASYMMETRIC,
        pld.from_laplace_mechanism(1.0, value_discretization_interval=GRID),  # sparse
        pld.from_randomized_response(0.5, 3, value_discretization_interval=GRID),
        pld.from_gaussian_mechanism(0.3, log_mass_truncation_bound=-4.0),  # much infinite mass
    ],
    ids=["gaussian", "subsampled", "laplace", "response", "truncated"],
)
def test_what_is_read_gives_the_public_deltas(theirs, monkeypatch):
    if theirs.get_delta_for_epsilon(50.0) > 1e-3:
        monkeypatch.setattr(f"{__name__}.GRID", 1e-4)
    found = np.max([deltas_of(loss, EPSILONS) for loss in grid_losses(theirs)], axis=0)
    np.testing.assert_allclose(found, theirs.get_delta_for_epsilon(EPSILONS), rtol=1e-9, atol=1e-12)


def test_only_a_symmetric_loss_is_one_object():
    removed, added = grid_losses(pld.from_gaussian_mechanism(1.0))
    assert removed is added
    removed, added = grid_losses(ASYMMETRIC)
    assert removed is not added


def test_what_is_written_is_read_back():
    removed, added = grid_losses(ASYMMETRIC)
    ours = distribution(GRID, removed, added)
    np.testing.assert_array_equal(
        ours.get_delta_for_epsilon(EPSILONS), ASYMMETRIC.get_delta_for_epsilon(EPSILONS)
    )
    for wrote, read in zip((removed, added), grid_losses(ours), strict=True):
        np.testing.assert_array_equal(wrote.probabilities, read.probabilities)
        assert wrote[1:] == read[1:]
    both = distribution(GRID, GridLoss(np.array([0.5, 0.25]), 3, 0.25))
    first, second = grid_losses(both)
    assert first is second
    assert both.get_delta_for_epsilon(1.0) == pytest.approx(0.25)
    # Composition is dp-accounting's own use of the same fields.
    assert both.self_compose(2).get_delta_for_epsilon(1.0) == pytest.approx(1 - 0.75**2)


def test_connecting_the_dots_returns_the_deltas_at_the_dots():
    lowest, highest = -100, 300
    epsilons = GRID * np.arange(lowest, highest + 1)
    gaussian = pld.from_gaussian_mechanism(1.0, value_discretization_interval=1e-4)
    exact = gaussian.get_delta_for_epsilon(epsilons)
    loss = from_deltas(GRID, lowest, highest, exact)
    np.testing.assert_allclose(deltas_of(loss, epsilons), exact, rtol=1e-9, atol=1e-12)
    assert loss.infinite == exact[-1]
