"""Concatenated parameters: several leaves side by side in one array.

A recurrent cell concatenates the weights of its gates and multiplies once. Each leaf is then a
window of the array, and has its own windows in the other operands and in the output of the
equation that uses it. Here is everything about windows but the rule of each linear primitive, which
is in `_primitives`.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax

# The start and the size of a part of an array along each axis.
Box: TypeAlias = tuple[tuple[int, int], ...]
# None is the whole array.
Window: TypeAlias = Box | None


def cut(value: Any, window: Window) -> Any:
    """Cuts a window out of the last axes of an array."""
    if window is None:
        return value
    # The leading axes are those of the batch and of scans.
    return value[(..., *(slice(start, start + size) for start, size in window))]


def cut_spec(value: Any, window: Window) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a window."""
    shape = value.shape if window is None else tuple(size for _, size in window)
    return jax.ShapeDtypeStruct(shape, value.dtype)


def windows_after_concatenation(shapes: Sequence[tuple[int, ...]], axis: int) -> list[Box]:
    """Returns the window of each input of `concatenate` in its output."""
    windows = []
    start = 0
    for shape in shapes:
        window = [(0, size) for size in shape]
        window[axis] = (start, shape[axis])
        start += shape[axis]
        windows.append(tuple(window))
    return windows


def move_window(eqn: Any, window: Box) -> tuple[dict[str, Any], Box] | None:
    """Follows a window through an equation that only moves numbers.

    Returns the equation's params as they would be for the window alone, and the window in the
    output; None if the numbers of the window do not stay together.
    """
    primitive, params = eqn.primitive, eqn.params
    if primitive in (jax.lax.convert_element_type_p, jax.lax.copy_p):
        return params, window
    if primitive is jax.lax.transpose_p:
        return params, tuple(window[axis] for axis in params["permutation"])
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if primitive is jax.lax.broadcast_in_dim_p:
        size_param, target_axes = "shape", params["broadcast_dimensions"]
    elif primitive is jax.lax.reshape_p and _drop_ones(before) == _drop_ones(after):
        # The reshape only inserts or removes axes of size one, so each longer axis has one target.
        remaining = iter(axis for axis, size in enumerate(after) if size > 1)
        target_axes = [next(remaining) if size > 1 else None for size in before]
        size_param = "new_sizes"
    else:
        return None
    # An axis that is repeated or new is covered as a whole.
    moved = [(0, size) for size in after]
    for axis, target in enumerate(target_axes):
        if target is not None and before[axis] == after[target]:
            moved[target] = window[axis]
    return {**params, size_param: tuple(size for _, size in moved)}, tuple(moved)


def _drop_ones(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size > 1]
