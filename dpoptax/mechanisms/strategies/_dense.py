"""Dense strategy: any lower triangular matrix, for research and for short runs."""

from collections.abc import Iterable
from typing import Any

import attrs
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.mechanisms._strategy import Strategy
from dpoptax.mechanisms.strategies._noise_ring import NoiseRing, empty_ring, next_noise
from dpoptax.mechanisms.strategies._toeplitz import SMALLEST_NORM


def _rows(matrix: Any) -> tuple[tuple[float, ...], ...]:
    """Returns the rows of a lower triangular matrix, each up to its diagonal."""
    if isinstance(matrix, Iterable) and not hasattr(matrix, "dtype"):
        listed = [list(row) for row in matrix]
        # Rows up to the diagonal, as the fields hold them, or whole rows.
        matrix = np.zeros((len(listed), len(listed)))
        for number, row in enumerate(listed):
            if len(row) not in (number + 1, len(listed)):
                raise ValueError(
                    f"a strategy is a square matrix; got {len(listed)} rows, and {len(row)} "
                    f"numbers in row {number}. Pass whole rows, or each up to its diagonal."
                )
            matrix[number, : len(row)] = row
    array = np.asarray(matrix, np.float64)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not len(array):
        raise ValueError(
            f"a strategy is a square matrix; got shape {array.shape}. Pass one row and one column "
            "per step."
        )
    if not np.isfinite(array).all():
        raise ValueError("a strategy must be finite; got infinity or nan. Check its computation.")
    if not SMALLEST_NORM < abs(array).max() < 1 / SMALLEST_NORM:
        raise ValueError(
            "a strategy must have numbers whose squares can be computed; got a largest one of "
            f"{abs(array).max():.3g}. Divide the matrix by it: the scale does not matter."
        )
    if np.triu(array, 1).any():
        raise ValueError(
            "a strategy is lower triangular, because noise cannot depend on later steps; got "
            "numbers above the diagonal. Pass the Cholesky factor of C^T C in reverse order."
        )
    if (np.diagonal(array) <= 0).any():
        raise ValueError(
            "the diagonal of a strategy must be positive, so that the matrix has an inverse; got "
            f"{np.diagonal(array).min():g}. Change the signs of columns, which changes nothing."
        )
    return tuple(tuple(row[: number + 1].tolist()) for number, row in enumerate(array))


@attrs.frozen(slots=False)
class DenseStrategy(Strategy):
    """Any lower triangular matrix, scaled.

    The state of a run has one copy of the gradient's noise for each band but the first, and as many
    bands as there are steps in general: use it for short runs, and in tests.

    Attributes:
        rows: each row up to the diagonal. The constructor also takes a square matrix. Its scale
            does not matter.

    Raises:
        ValueError: the matrix is not square, not lower triangular, or has no inverse.

    Example:
        >>> strategy = DenseStrategy([[1.0, 0.0], [0.5, 1.0]])
        >>> strategy.num_steps, strategy.num_bands
        (2, 2)

    Reference: Denisov et al. 2022, arXiv:2202.08312.
    """

    rows: tuple[tuple[float, ...], ...] = attrs.field(converter=_rows, repr=False)

    @property
    def num_steps(self) -> int:  # type: ignore[override]
        """How many steps the strategy covers."""
        return len(self.rows)

    @property
    def num_bands(self) -> int:
        """See `Strategy`."""
        rows, columns = np.nonzero(self.matrix())
        return int((rows - columns).max()) + 1

    def matrix(self, num_steps: int | None = None) -> Float64[np.ndarray, "steps steps"]:
        """See `Strategy`."""
        steps = self.num_steps
        matrix = np.zeros((steps, steps))
        matrix[np.tril_indices(steps)] = np.concatenate(self.rows)
        matrix /= np.linalg.norm(matrix, axis=0).max()
        last = steps if num_steps is None else _validate.count("num_steps", num_steps)
        return matrix[:last, :last]

    def noise_norms(self) -> Float64[np.ndarray, " steps"]:
        """See `Strategy`."""
        import scipy.linalg  # slow to import

        inverse = scipy.linalg.solve_triangular(self.matrix(), np.eye(self.num_steps), lower=True)
        return np.asarray(np.linalg.norm(inverse, axis=1))

    def init(self, like: PyTree[Float[Array, "..."]]) -> NoiseRing:
        """Returns the state before the first step; see `Strategy`."""
        return empty_ring(like, self.num_bands - 1)

    def next(
        self, white: PyTree[Float[Array, "..."]], state: Any, step: Int[Array, ""]
    ) -> tuple[PyTree[Float[Array, "..."]], NoiseRing]:
        """Returns the noise of a step and the next state; see `Strategy`."""
        matrix, bands = self.matrix(), self.num_bands
        steps = np.arange(self.num_steps)
        # One row per step: the numbers from the diagonal to the left. Before the first step there
        # is nothing, and the state is zero.
        columns = steps[:, None] - np.arange(bands)
        table = np.where(columns >= 0, matrix[steps[:, None], np.maximum(columns, 0)], 0.0)
        return next_noise(white, state, step, jnp.asarray(table, jnp.float32)[step])
