"""Strategies from objects with the methods of JAX Privacy's `StreamingMatrix`."""

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.mechanisms._strategy import Strategy

# The matrix is measured in float32, so that its inverse has rounding errors. The noise is larger by
# this factor, which covers them.
MARGIN = 1.001
# Two runs of the object on different draws must agree with one matrix to this relative error.
TOLERANCE = 1e-3


class StreamingStrategy(Strategy):
    """A strategy from an object with the methods of JAX Privacy's `StreamingMatrix`.

    The object multiplies by `C^-1`, one step at a time: `init_multiply(shape)` returns a state, and
    `multiply_next(value, state)` the next row of the product and the next state. It must be linear.
    The constructor runs it on every unit vector, and accounts the matrix that comes out.

    A measured matrix has rounding errors instead of zeros, so that it counts as having as many
    bands as steps. For amplification by sampling, make a `BandedToeplitz` of its coefficients.

    Args:
        streaming: the object.
        num_steps: how many steps the strategy covers. Some objects repeat a row after their last
            one, so this must not exceed the steps that they are made for.

    Attributes:
        num_steps: how many steps the strategy covers.
        digest: of the matrix, by which two strategies are told apart.

    Raises:
        TypeError: the object does not have the two methods.
        ValueError: the object is not a linear, lower triangular matrix with an inverse.

    Example:
        >>> import jax.numpy as jnp
        >>> class Difference:  # the noise of a step minus half of the last draw
        ...     def init_multiply(self, shape):
        ...         return jnp.zeros(getattr(shape, "shape", shape))
        ...
        ...     def multiply_next(self, value, state):
        ...         return value - 0.5 * state, value
        >>> StreamingStrategy(Difference(), num_steps=3).matrix().shape
        (3, 3)

    Reference: jax_privacy.matrix_factorization.streaming_matrix.
    """

    # Outside of `vars`, which the keys of the noise are derived from.
    __slots__ = ("_inverse", "_streaming")

    def __init__(self, streaming: Any, num_steps: int) -> None:
        for name in ("init_multiply", "multiply_next"):
            if not callable(getattr(streaming, name, None)):
                raise TypeError(
                    f"expected an object with the method {name}, such as a StreamingMatrix of JAX "
                    f"Privacy; got {_validate.described(streaming)}."
                )
        self.num_steps: int = _validate.count("num_steps", num_steps)
        inverse = _measured(streaming, np.eye(self.num_steps))
        _check_matrix(inverse)
        # Any numbers without a pattern.
        draws = np.cos(np.arange(1, 3 * self.num_steps + 1) ** 1.5).reshape(-1, 3)
        product = inverse @ draws
        difference = abs(_measured(streaming, draws) - product).max()
        if difference > TOLERANCE * max(1.0, abs(product).max()):
            raise ValueError(
                "a strategy must be linear: its noise must be a matrix times the draws; got an "
                f"object that differs from its own matrix by {difference:.2g}. Pass one that "
                "multiplies by a fixed matrix."
            )
        self.digest: str = hashlib.sha256(inverse.astype("<f4").tobytes()).hexdigest()
        self._streaming, self._inverse = streaming, inverse

    def __repr__(self) -> str:
        """Names the matrix by its digest."""
        return f"StreamingStrategy(num_steps={self.num_steps}, digest={self.digest[:12]!r})"

    def __eq__(self, other: object) -> bool:
        """Equal matrices for equally many steps."""
        if not isinstance(other, StreamingStrategy):
            return NotImplemented
        return vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.num_steps, self.digest))

    @property
    def num_bands(self) -> int:
        """See `Strategy`."""
        is_diagonal = not np.tril(self._inverse, -1).any()
        return 1 if is_diagonal else self.num_steps

    def matrix(self, num_steps: int | None = None) -> Float64[np.ndarray, "steps steps"]:
        """See `Strategy`."""
        matrix = _matrix_of(self)
        last = self.num_steps if num_steps is None else _validate.count("num_steps", num_steps)
        return matrix[:last, :last].copy()

    def noise_norms(self) -> Float64[np.ndarray, " steps"]:
        """See `Strategy`."""
        return np.asarray(np.linalg.norm(self._inverse, axis=1)) * self._scale()

    def init(self, like: PyTree[Float[Array, "..."]]) -> Any:
        """Returns the state before the first step; see `Strategy`."""
        return self._streaming.init_multiply(
            jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), like)
        )

    def next(
        self, white: PyTree[Float[Array, "..."]], state: Any, step: Int[Array, ""]
    ) -> tuple[PyTree[Float[Array, "..."]], Any]:
        """Returns the noise of a step and the next state; see `Strategy`."""
        del step
        noise, state = self._streaming.multiply_next(white, state)
        scale = self._scale()
        return jax.tree.map(lambda leaf: leaf * jnp.asarray(scale, leaf.dtype), noise), state

    def _scale(self) -> float:
        """What the noise is multiplied with, so that the largest column of `C` has norm one."""
        return float(1 / (_matrix_of(self)[0, 0] * self._inverse[0, 0]))


@functools.lru_cache(maxsize=8)
def _matrix_of(strategy: StreamingStrategy) -> Float64[np.ndarray, "steps steps"]:
    import scipy.linalg  # slow to import

    identity = np.eye(strategy.num_steps)
    matrix = scipy.linalg.solve_triangular(strategy._inverse, identity, lower=True)
    return np.asarray(matrix / np.linalg.norm(matrix, axis=0).max() / MARGIN)


def _measured(streaming: Any, draws: Float64[np.ndarray, "steps columns"]) -> np.ndarray:
    """Returns the product of the matrix with draws, row by row."""

    def advance(state: Any, row: Array) -> tuple[Any, Array]:
        noise, state = streaming.multiply_next(row, state)
        return state, noise

    rows = jnp.asarray(draws, jnp.float32)
    state = streaming.init_multiply(jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype))
    _, product = jax.lax.scan(advance, state, rows)
    return np.asarray(product, np.float64)


def _check_matrix(inverse: Float64[np.ndarray, "steps steps"]) -> None:
    if not np.isfinite(inverse).all():
        raise ValueError(
            "the noise of a strategy must be finite; got infinity or nan. Take fewer steps, or "
            "another matrix."
        )
    if np.triu(inverse, 1).any() or (np.diagonal(inverse) <= 0).any():
        raise ValueError(
            "a strategy needs a lower triangular matrix with a positive diagonal; got another one. "
            "multiply_next must add a positive multiple of its own value to what it keeps, and "
            "know nothing of later values."
        )


def no_record(num_steps: int, digest: str) -> StreamingStrategy:
    """Refuses to make an object with methods from its record."""
    del num_steps, digest
    raise ValueError(
        "a StreamingStrategy cannot be read from JSON, which has only the digest of its matrix. "
        "Make the mechanism again from its object, and pass it."
    )
