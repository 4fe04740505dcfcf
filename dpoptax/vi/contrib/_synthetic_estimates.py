"""Rubin's rules for synthetic data: one estimate and its variance from several synthetic data sets.

Reference: Raghunathan, Reiter and Rubin 2003, "Multiple imputation for statistical disclosure
limitation".
"""

from typing import Any, NamedTuple

import numpy as np


class CombinedEstimate(NamedTuple):
    """An estimate from several synthetic data sets.

    Attributes:
        estimate: the mean of the estimates.
        variance: the variance of that mean around the true value.
        degrees_of_freedom: of the t distribution that gives a confidence interval.
    """

    estimate: np.ndarray
    variance: np.ndarray
    degrees_of_freedom: np.ndarray


def combine_synthetic_estimates(estimates: Any, variances: Any) -> CombinedEstimate:
    """Combines the estimates from several fully synthetic data sets by Rubin's rules.

    With m sets, b the variance between the estimates and u the mean of their own variances,

        T = (1 + 1/m) b - u,   (m - 1) (1 - u / ((1 + 1/m) b))**2 degrees of freedom

    T can be negative if there are few sets. Then u is returned instead, which is too large.

    Args:
        estimates: `(sets, ...)`, one estimate from each set.
        variances: of the same shape, the variance of each estimate as computed from its own set.

    Returns:
        A `CombinedEstimate` of arrays `(...)`.

    Raises:
        ValueError: fewer than two sets, different shapes, or a negative variance.

    Example:
        >>> combined = combine_synthetic_estimates([1.0, 3.0, 2.0], [0.1, 0.1, 0.1])
        >>> float(combined.estimate), round(float(combined.variance), 3)
        (2.0, 1.233)

    Reference: Raghunathan, Reiter and Rubin 2003, equations 3 to 5; Reiter 2002 for T below zero.
    """
    q, u = np.asarray(estimates, float), np.asarray(variances, float)
    if q.shape != u.shape or q.ndim == 0 or len(q) < 2:
        raise ValueError(
            "estimates and variances must have the same shape, (sets, ...) with two sets or more; "
            f"got {q.shape} and {u.shape}."
        )
    if np.any(u < 0):
        raise ValueError(f"a variance cannot be negative; got {u.min()}.")
    between, within = (1 + 1 / len(q)) * q.var(axis=0, ddof=1), u.mean(axis=0)
    total = between - within
    # Equal estimates give between = 0, where the formula divides by zero.
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = (len(q) - 1) * np.where(between > 0, 1 - within / between, 0.0) ** 2
    return CombinedEstimate(
        estimate=q.mean(axis=0),
        variance=np.where(total > 0, total, within),
        degrees_of_freedom=np.where(total > 0, freedom, len(q) - 1),
    )
