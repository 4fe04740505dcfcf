"""Small functions on arrays, under the names of `d3p.util`."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dpoptax.compat.d3p import random as strong_rng
from dpoptax.compat.d3p._suites import as_key, check_suite
from dpoptax.samplers import _feistel

__all__ = [
    "example_count",
    "has_shape",
    "is_array",
    "is_int_scalar",
    "is_integer",
    "is_scalar",
    "map_over_secondary_dims",
    "normalize",
    "sample_from_array",
    "unvectorize_shape",
    "unvectorize_shape_1d",
    "unvectorize_shape_2d",
    "unvectorize_shape_3d",
]


def __dir__() -> list[str]:
    return __all__


def map_over_secondary_dims(f: Callable[[Any], Any]) -> Callable[[Any], Array]:
    """Maps a function of a vector over all axes of an array but the first.

    Args:
        f: a function from a vector to a scalar.

    Returns:
        A function from `(a, b, c, ...)` to `(b, c, ...)`.

    Example:
        >>> import jax.numpy as jnp
        >>> map_over_secondary_dims(jnp.sum)(jnp.ones((4, 2, 3))).tolist()
        [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]
    """

    @functools.wraps(f)
    def mapped(array: Any) -> Array:
        array = jnp.asarray(array)
        columns = array.reshape(array.shape[0], -1)
        return jax.vmap(f, in_axes=1)(columns).reshape(array.shape[1:])

    return mapped


def example_count(a: Any) -> int:
    """Returns the length of the first axis; 1 for a scalar.

    Args:
        a: an array.

    Returns:
        A number of examples.

    Example:
        >>> example_count([[1, 2], [3, 4], [5, 6]]), example_count(7.0)
        (3, 1)
    """
    shape = np.shape(a)
    return shape[0] if shape else 1


def has_shape(a: Any) -> bool:
    """Returns whether a value has a shape, as arrays do.

    Args:
        a: any value.

    Returns:
        True or False.

    Example:
        >>> import numpy as np
        >>> has_shape(np.ones(2)), has_shape(2.0)
        (True, False)
    """
    return hasattr(a, "shape")


def is_array(a: Any) -> bool:
    """Returns whether a value is an array with at least one axis.

    Args:
        a: any value.

    Returns:
        True or False.

    Example:
        >>> import numpy as np
        >>> is_array(np.ones(2)), is_array(np.ones(()))
        (True, False)
    """
    return has_shape(a) and np.ndim(a) > 0


def is_scalar(x: Any) -> bool:
    """Returns whether a value is a number, or an array of one number.

    Args:
        x: any value.

    Returns:
        True or False.

    Example:
        >>> import numpy as np
        >>> is_scalar(2.0), is_scalar(np.ones((1, 1))), is_scalar(np.ones(2))
        (True, True, False)
    """
    return bool(np.isscalar(x)) or (has_shape(x) and math.prod(x.shape) == 1)


def is_integer(x: Any) -> bool:
    """Returns whether a number, or the numbers of an array, are of an integer type.

    Args:
        x: any value.

    Returns:
        True or False.

    Example:
        >>> import numpy as np
        >>> is_integer(2), is_integer(np.arange(3)), is_integer(2.0)
        (True, True, False)
    """
    return bool(jnp.issubdtype(x.dtype if has_shape(x) else type(x), jnp.integer))


def is_int_scalar(x: Any) -> bool:
    """Returns whether a value is one whole number.

    Args:
        x: any value.

    Returns:
        True or False.

    Example:
        >>> import numpy as np
        >>> is_int_scalar(2), is_int_scalar(np.arange(3))
        (True, False)
    """
    return is_scalar(x) and is_integer(x)


def normalize(x: Any) -> Array:
    """Returns a vector divided by its Euclidean norm.

    Args:
        x: a vector.

    Returns:
        A vector of norm 1.

    Example:
        >>> import jax.numpy as jnp
        >>> [round(float(entry), 3) for entry in normalize(jnp.array([3.0, 4.0]))]
        [0.6, 0.8]
    """
    return x / jnp.linalg.norm(x)


def unvectorize_shape(a: Any, d: int) -> tuple[int, ...]:
    """Returns the shape of an array, with ones in front up to a number of axes.

    Args:
        a: an array.
        d: how many axes the shape has at least.

    Returns:
        A shape.

    Example:
        >>> unvectorize_shape([1, 2, 3], 3)
        (1, 1, 3)
    """
    shape = np.shape(a)
    return (1,) * (d - len(shape)) + shape


def unvectorize_shape_1d(a: Any) -> tuple[int, ...]:
    """`unvectorize_shape` with at least one axis.

    Args:
        a: an array.

    Returns:
        A shape.

    Example:
        >>> unvectorize_shape_1d(2.0)
        (1,)
    """
    return unvectorize_shape(a, 1)


def unvectorize_shape_2d(a: Any) -> tuple[int, ...]:
    """`unvectorize_shape` with at least two axes.

    Args:
        a: an array.

    Returns:
        A shape.

    Example:
        >>> unvectorize_shape_2d([1, 2, 3])
        (1, 3)
    """
    return unvectorize_shape(a, 2)


def unvectorize_shape_3d(a: Any) -> tuple[int, ...]:
    """`unvectorize_shape` with at least three axes.

    Args:
        a: an array.

    Returns:
        A shape.

    Example:
        >>> unvectorize_shape_3d([1, 2, 3])
        (1, 1, 3)
    """
    return unvectorize_shape(a, 3)


def sample_from_array(
    rng_key: Any, x: Any, n: int, axis: int, rng_suite: Any = strong_rng
) -> Array:
    """Draws n different elements of an array along an axis.

    Args:
        rng_key: a key of `d3p.random`.
        x: an array.
        n: how many elements to draw; at most the length of the axis.
        axis: the axis.
        rng_suite: `dpoptax.compat.d3p.random`.

    Returns:
        An array whose axis has length n.

    Raises:
        TypeError: another `rng_suite`.
        ValueError: n is longer than the axis.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> drawn = sample_from_array(jax.random.key(0), jnp.arange(5), 5, 0)
        >>> sorted(drawn.tolist())
        [0, 1, 2, 3, 4]
    """
    check_suite(rng_suite)
    length = np.shape(x)[axis]
    if n > length:
        raise ValueError(
            f"n is at most the length of the axis, {length}; got {n}. Draw fewer elements."
        )
    slots = jnp.arange(n, dtype=jnp.int32)
    return jnp.take(jnp.asarray(x), _feistel.permute(as_key(rng_key), slots, length), axis)
