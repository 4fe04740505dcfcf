"""Noise for a target epsilon, under the names of `d3p.dputil`.

How much noise is needed depends on how batches are drawn. The number that is returned remembers for
which batches it was computed, and `DPSVI` refuses others.
"""

import fractions
import math

from dpoptax import _validate
from dpoptax.accounting import calibrate_noise_multiplier
from dpoptax.compat.d3p._laws import NoiseFor
from dpoptax.relations import Relation
from dpoptax.samplers import FixedSize, Poisson, Sampler

__all__ = ["approximate_sigma", "approximate_sigma_remove_relation"]


def __dir__() -> list[str]:
    return __all__


def approximate_sigma(
    target_eps: float,
    delta: float,
    q: float,
    num_iter: int,
    tol: float = 1e-4,
    force_smaller: bool = False,
    maxeval: int = 10,
) -> tuple[float, float, int]:
    """Returns the noise for a target epsilon, if neighbours differ in the value of one example.

    It holds for batches of `subsample_batchify_data`, and for those of `poisson_batchify_data`,
    which need less. d3p computes with the second in both cases, which is not enough for the first:
    another example takes the place of one that is left out, so a sum moves by twice the bound.

    Args:
        target_eps: the target.
        delta: strictly between 0 and 1.
        q: the sampling rate: the expected batch size divided by the number of examples.
        num_iter: how many updates will run.
        tol: not used: epsilon is never above the target, and less than 1 % below.
        force_smaller: not used, as it always holds.
        maxeval: not used.

    Returns:
        `dp_scale`, its epsilon at `delta`, and 1, in place of d3p's number of evaluations.

    Raises:
        TypeError: a count that is not whole, or a number that is not real.
        ValueError: a number out of range, or a target that no noise reaches.

    Example:
        >>> sigma, eps, _ = approximate_sigma(1.0, 1e-5, q=0.01, num_iter=1000)
        >>> round(sigma, 2), 0.99 < eps <= 1.0
        (3.18, True)

    Reference: Lebeda, Regehr, Kamath and Steinke 2024, arXiv:2405.20769, on such batches.
    """
    del tol, force_smaller, maxeval
    rate = fractions.Fraction(_rate(q)).limit_denominator(10**6)
    sampler = FixedSize(rate.denominator, rate.numerator)
    return _calibrated(target_eps, delta, sampler, num_iter, "replace_one")


def approximate_sigma_remove_relation(
    target_eps: float,
    delta: float,
    q: float,
    num_iter: int,
    tol: float = 1e-4,
    force_smaller: bool = False,
    maxeval: int = 10,
) -> tuple[float, float, int]:
    """Returns the noise for a target epsilon, if neighbours differ by one example more or less.

    It holds for batches of `poisson_batchify_data` only. `DPSVI` refuses other batches with this
    noise; `float(sigma)` is a plain number, for Poisson batches that you draw yourself.

    Args:
        target_eps: as in `approximate_sigma`.
        delta: as in `approximate_sigma`.
        q: as in `approximate_sigma`.
        num_iter: as in `approximate_sigma`.
        tol: not used, as in `approximate_sigma`.
        force_smaller: not used, as in `approximate_sigma`.
        maxeval: not used, as in `approximate_sigma`.

    Returns:
        As `approximate_sigma`.

    Raises:
        TypeError: as in `approximate_sigma`.
        ValueError: as in `approximate_sigma`.

    Example:
        >>> sigma, eps, _ = approximate_sigma_remove_relation(1.0, 1e-5, q=0.01, num_iter=1000)
        >>> round(sigma, 2), 0.99 < eps <= 1.0
        (1.41, True)
    """
    del tol, force_smaller, maxeval
    # Epsilon of Poisson batches depends on the rate alone, so any number of examples will do.
    count = math.ceil(1 / _rate(q))
    sampler = Poisson(count, q * count)
    return _calibrated(target_eps, delta, sampler, num_iter, "add_or_remove_one")


def _rate(q: float) -> float:
    if not 0 < _validate.real("q", q) <= 1:
        raise ValueError(
            f"q is a sampling rate, above 0 and at most 1; got {_validate.described(q)}. Pass the "
            "batch size divided by the number of examples."
        )
    return q


def _calibrated(
    epsilon: float, delta: float, sampler: Sampler, num_steps: int, relation: Relation
) -> tuple[float, float, int]:
    found = calibrate_noise_multiplier(
        epsilon=epsilon, delta=delta, sampler=sampler, num_steps=num_steps, relation=relation
    )
    return NoiseFor(found.noise_multiplier, type(sampler)), found.epsilon, 1
