"""Adapter to dp-accounting: the only file that reads its private attributes.

dp-accounting has no public way to the probabilities of a privacy loss distribution (PLD), which
our composition needs. `tests/accounting/test_dp_accounting_compat.py` compares what is read here
with dp-accounting's public answers, so that a new version cannot change their meaning unnoticed.
"""

from typing import NamedTuple

import numpy as np
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

__all__ = ["GridLoss", "distribution", "from_deltas", "grid_losses"]


class GridLoss(NamedTuple):
    """A privacy loss on the grid, in one direction of neighbours.

    Attributes:
        probabilities: of the grid points `lowest`, `lowest + 1`, ...
        lowest: the first grid point, in grid steps.
        infinite: the probability of an infinite loss.
    """

    probabilities: np.ndarray
    lowest: int
    infinite: float


def grid_losses(loss: PrivacyLossDistribution) -> tuple[GridLoss, GridLoss]:
    """Returns the loss when an example is removed, and when one is added.

    The two are the same object where the loss is symmetric.
    """
    removed = _grid_loss(loss._pmf_remove)
    if loss._pmf_add is loss._pmf_remove:
        return removed, removed
    return removed, _grid_loss(loss._pmf_add)


def from_deltas(grid_step: float, lowest: int, highest: int, deltas: np.ndarray) -> GridLoss:
    """Returns the least pessimistic loss on the grid points from `lowest` to `highest`.

    `deltas` is the delta at each of the grid points. The result is dp-accounting's
    connect-the-dots (Doroshenko et al. 2022, arXiv:2207.04380).
    """
    return _grid_loss(
        pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(grid_step, lowest, highest, deltas)
    )


def distribution(
    grid_step: float, removed: GridLoss, added: GridLoss | None = None
) -> PrivacyLossDistribution:
    """Returns dp-accounting's distribution; without `added` both directions have one loss."""
    pmfs = [
        pld_pmf.DensePLDPmf(grid_step, loss.lowest, loss.probabilities, loss.infinite, True)
        for loss in (removed, added)
        if loss is not None
    ]
    return PrivacyLossDistribution(*pmfs)


def _grid_loss(pmf: pld_pmf.PLDPmf) -> GridLoss:
    # A sparse distribution has other attributes; the dense form is the same distribution.
    dense = pmf.to_dense_pmf()
    return GridLoss(np.asarray(dense._probs), int(dense._lower_loss), float(dense._infinity_mass))
