"""Power series: the first columns of lower triangular Toeplitz matrices.

Such a matrix is given by its first column. Products of matrices are convolutions of first columns,
and inverses are recursive filters.
"""

import numpy as np
from jaxtyping import Float64

Series = Float64[np.ndarray, " steps"]


def padded(coefficients: tuple[float, ...], num_steps: int) -> Series:
    """Returns the first column of a matrix of `num_steps` rows."""
    column = np.zeros(num_steps)
    given = coefficients[:num_steps]
    column[: len(given)] = given
    return column


def divide(numerator: Series, denominator: np.ndarray) -> Series:
    """Returns the first column of the product with an inverse."""
    import scipy.signal  # slow to import

    return np.asarray(scipy.signal.lfilter([1.0], denominator, numerator))


def unit(num_steps: int) -> Series:
    """Returns the first column of the identity."""
    return padded((1.0,), num_steps)


def square_root(num_terms: int) -> Series:
    """Returns the square root of the prefix sum matrix: 1, 1/2, 3/8 and so on."""
    factors = 1 - 0.5 / np.arange(1, num_terms)
    return np.concatenate([[1.0], np.cumprod(factors)])


def inverse_square_root(num_terms: int) -> Series:
    """Returns the inverse of that: 1, -1/2, -1/8 and so on."""
    return square_root(num_terms) / (1 - 2 * np.arange(num_terms))


def prefix_sums(num_steps: int, momentum: float) -> Series:
    """Returns the matrix from gradients to parameters, under heavy-ball momentum."""
    return np.cumsum(momentum ** np.arange(num_steps))


def repeated(column: Series, separation: int, count: int) -> Series:
    """Returns the sum of the columns 0, separation, 2 * separation and so on, `count` of them."""
    total = np.zeros(len(column))
    for start in range(0, min(count * separation, len(column)), separation):
        total[start:] += column[: len(column) - start]
    return total
