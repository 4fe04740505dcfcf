"""Whether an array that a program captured holds numbers of the private data."""

import math
from typing import Any

import numpy as np

# Rows of a captured array are looked up among this many rows of the data.
_MOST_ROWS = 100_000
# So many fractions are not all numbers of the data by accident. They are looked up among the first.
_MANY, _MOST_NUMBERS = 8, 1_000_000


def is_column(array: np.ndarray, column: Any) -> bool:
    """Whether an array is a column, in another type or in the same."""
    other = np.asarray(column)
    return array.shape == other.shape and np.array_equal(array, other.astype(array.dtype))


def has_one_entry_per_example(shape: tuple[int, ...], num_examples: int) -> bool:
    """Whether an array has an axis of the examples, or its first axes are one in parts."""
    sizes = [math.prod(shape[:length]) for length in range(1, len(shape) + 1)]
    return num_examples > 1 and num_examples in (*shape, *sizes)


def holds(array: np.ndarray, column: np.ndarray) -> bool:
    """Whether an array is a column in another shape, or has rows of it."""
    if array.ndim == 0 or array.dtype.kind == "b" or column.dtype.kind not in "fiu":
        return False
    same_size = array.dtype.itemsize == column.dtype.itemsize
    if array.dtype.kind in "iu" and column.dtype.kind == "f" and same_size:
        return holds(array.view(column.dtype), column)
    column = column.astype(array.dtype)
    if array.size == column.size and array.size > 1:
        turned = (array, array.T)
        if any(np.array_equal(one.reshape(-1), column.reshape(-1)) for one in turned):
            return len(np.unique(column)) > 1
    if _has_numbers_of(array, column) or _has_run_of(array, column):
        return True
    if array.shape[-column.ndim + 1 :] != column.shape[1:] or column.ndim < 2:
        return False
    width = int(np.prod(column.shape[1:]))
    # Rows with few different numbers, such as zeros, are equal by accident.
    rows = {row.tobytes() for row in column[:_MOST_ROWS].reshape(-1, width) if _tells(row)}
    return any(row.tobytes() in rows for row in array.reshape(-1, width))


def _has_numbers_of(array: np.ndarray, column: np.ndarray) -> bool:
    """Whether all of many different fractions are numbers of the data."""
    if array.dtype.kind != "f":
        return False
    found = np.unique(array[np.isfinite(array)])
    found = found[found != np.rint(found)]
    return len(found) >= _MANY and bool(np.isin(found, column.reshape(-1)[:_MOST_NUMBERS]).all())


def _has_run_of(array: np.ndarray, column: np.ndarray) -> bool:
    """Whether whole numbers that do not just count follow each other in the data."""
    if (
        array.dtype.kind not in "iu"
        or array.size < _MANY
        or len(np.unique(np.diff(array.ravel()))) < 2
    ):
        return False
    place = column.tobytes().find(array.tobytes())
    return place >= 0 and len(np.unique(array)) > 2


def _tells(row: np.ndarray) -> bool:
    return len(np.unique(row)) > 2
