"""Optimal coefficients of Toeplitz strategies: L-BFGS on an error with an analytic gradient.

Let a, c and e be the first columns of the workload A, the strategy C and A C^-1. Row t of A C^-1 is
the noise of the parameters after step t, so their mean squared error is

    sensitivity(c)^2 * sum over t of (1 - t / n) e_t^2,    where c * e = a (a convolution).

A change of c_j moves e by minus the filter of e by 1 / c, delayed by j.
"""

from collections.abc import Callable

import numpy as np

from dpoptax import _validate
from dpoptax.mechanisms.strategies._series import (
    Series,
    divide,
    inverse_square_root,
    prefix_sums,
    repeated,
    square_root,
    unit,
)

MAX_ITERATIONS = 300
# Instead of the error of a matrix whose inverse overflows.
TOO_LARGE = 1e30
# More inner products than this are cheaper by Fourier transforms.
MANY_DELAYS = 64

# From the free coefficients to the logarithm of the error and its gradient.
Objective = Callable[[np.ndarray], tuple[float, np.ndarray]]


def banded_coefficients(num_bands: int, num_steps: int, momentum: float) -> tuple[float, ...]:
    """Returns the best coefficients of `num_bands` bands for one participation; the first is 1."""
    workload, weights = _workload(num_steps, momentum)
    num_bands = min(num_bands, num_steps)

    def objective(rest: np.ndarray) -> tuple[float, np.ndarray]:
        column = np.concatenate([[1.0], rest])
        error, by_error = _error(column, workload, weights)
        squared = float(column @ column)
        return _logarithm(squared * error, squared * by_error + error * 2 * column)

    return _minimize(objective, square_root(num_bands))


def inverse_coefficients(
    num_taps: int, num_steps: int, separation: int, count: int, momentum: float
) -> tuple[float, ...]:
    """Returns the best inverse of `num_taps` bands for these participations; the first is 1."""
    workload, weights = _workload(num_steps, momentum)
    num_taps = min(num_taps, num_steps)

    def objective(rest: np.ndarray) -> tuple[float, np.ndarray]:
        inverse = np.concatenate([[1.0], rest])
        column = divide(unit(num_steps), inverse)
        # A change of inverse[j] moves the column by minus its own filter, delayed by j.
        moved = repeated(divide(column, inverse), separation, count)
        total = repeated(column, separation, count)
        squared = float(total @ total)
        noise = np.convolve(workload, inverse)[:num_steps]
        error = float(weights @ noise**2)
        by_error = 2 * _delayed_products(weights * noise, workload, num_taps)
        by_squared = -2 * _delayed_products(total, moved, num_taps)
        return _logarithm(squared * error, squared * by_error + error * by_squared)

    return _minimize(objective, inverse_square_root(num_taps))


def buffer_parameters(
    num_buffers: int, num_steps: int, separation: int, count: int, momentum: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the best scales and decays of buffers for these participations."""
    workload, weights = _workload(num_steps, momentum)
    exponents = np.arange(num_steps - 1)

    def objective(free: np.ndarray) -> tuple[float, np.ndarray]:
        # Logarithms of the scales, and logits of the decays: both are positive, and the decays
        # below one.
        scales, decays = np.exp(free[:num_buffers]), 1 / (1 + np.exp(-free[num_buffers:]))
        powers = np.power.outer(decays, exponents)
        column = np.concatenate([[1.0], scales @ powers])
        error, by_error = _error(column, workload, weights)
        total = repeated(column, separation, count)
        squared = float(total @ total)
        by_squared = 2 * _delayed_products(total, repeated(unit(num_steps), separation, count))
        value, by_column = _logarithm(squared * error, squared * by_error + error * by_squared)
        by_scales = scales * (powers @ by_column)
        slopes = exponents * np.power.outer(decays, np.maximum(exponents - 1, 0))
        by_decays = decays * (1 - decays) * scales * (slopes @ by_column)
        return value, np.concatenate([by_scales, by_decays])

    # The square root has a continuum of decays. These are equally far apart in the logarithm of
    # the number of steps after which they end.
    ends = np.geomspace(1.5, max(num_steps / 2, 2.0), num_buffers)
    start = np.concatenate([np.full(num_buffers, np.log(0.3)) - 0.5 * np.log(ends), np.log(ends)])
    found = _least(objective, start)
    decays = 1 / (1 + np.exp(-found[num_buffers:]))
    return tuple(np.exp(found[:num_buffers]).tolist()), tuple(decays.tolist())


def participations(num_steps: int, separation: int | None, count: int | None) -> tuple[int, int]:
    """Returns the separation and the number of participations that are meant."""
    if separation is None:
        if count is not None and _validate.count("count", count) > 1:
            raise TypeError(
                f"count={count} participations need a separation; got none. Pass separation=, the "
                "number of steps from one to the next."
            )
        return num_steps, 1
    separation = _validate.count("separation", separation)
    fitting = -(-num_steps // separation)
    return separation, fitting if count is None else min(_validate.count("count", count), fitting)


def checked_momentum(momentum: float) -> float:
    """Returns a momentum from 0 to below 1."""
    value = _validate.non_negative("momentum", momentum)
    if value >= 1:
        raise ValueError(
            f"momentum must be below 1; got {value}. Pass that of the optimizer, such as 0.9."
        )
    return value


def _workload(num_steps: int, momentum: float) -> tuple[Series, Series]:
    weights = 1 - np.arange(num_steps) / num_steps
    return prefix_sums(num_steps, checked_momentum(momentum)), weights


def _error(column: np.ndarray, workload: Series, weights: Series) -> tuple[float, np.ndarray]:
    """The mean squared error for sensitivity one, and its gradient by the coefficients."""
    noise = divide(workload, column)
    moved = divide(noise, column)
    return float(weights @ noise**2), -2 * _delayed_products(weights * noise, moved, len(column))


def _delayed_products(left: Series, right: Series, num: int | None = None) -> np.ndarray:
    """The inner products of `left` with `right` delayed by 0, 1 and so on, `num` of them."""
    import scipy.signal  # slow to import

    size = len(left)
    if num is None or num > MANY_DELAYS:
        products = scipy.signal.fftconvolve(left[::-1], right)[:size][::-1]
        return np.asarray(products[:num])
    return np.array([left[delay:] @ right[: size - delay] for delay in range(num)])


def _logarithm(value: float, gradient: np.ndarray) -> tuple[float, np.ndarray]:
    """The logarithm and its gradient by all coefficients but the first, which is fixed."""
    if not (np.isfinite(value) and np.isfinite(gradient).all() and value < TOO_LARGE):
        return float(np.log(TOO_LARGE)), np.zeros(len(gradient) - 1)
    return float(np.log(value)), gradient[1:] / value


def _minimize(objective: Objective, start: np.ndarray) -> tuple[float, ...]:
    if len(start) == 1:
        return (1.0,)
    return (1.0, *_least(objective, start[1:]).tolist())


def _least(objective: Objective, start: np.ndarray) -> np.ndarray:
    import scipy.optimize  # slow to import

    # A step too far gives a matrix whose inverse overflows; its error counts as TOO_LARGE.
    with np.errstate(over="ignore", invalid="ignore"):
        found = scipy.optimize.minimize(
            objective,
            start,
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": MAX_ITERATIONS, "ftol": 1e-13, "gtol": 1e-9},
        )
    # The start is never given up for anything worse.
    return np.asarray(found.x if found.fun <= objective(start)[0] else start)
