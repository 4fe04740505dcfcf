"""Row rules: which primitives compute row i of their output from row i of their inputs.

A rule gets an equation and the axis of the examples in each operand, None for operands that are
public. It returns the axis in each output, or None if the primitive combines examples, or may.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from dpoptax.audit._words import words

Axes: TypeAlias = Sequence[int | None]
Found: TypeAlias = list[int] | None
Rule: TypeAlias = Callable[[Any, Axes], Found]

_ELEMENTWISE = words(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil
    clamp clz complex conj convert_element_type copy cos cosh digamma div eq eq_to erf erf_inv
    erfc exp exp2 expm1 floor ge gt igamma igammac igamma_grad_a imag integer_pow is_finite le
    le_to lgamma log log1p logistic lt lt_to max min mul name ne neg nextafter not or polygamma
    population_count pow real reduce_precision regularized_incomplete_beta rem round rsqrt
    select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
    stop_gradient sub tan tanh xor zeta mulhi device_put sharding_constraint
    """
)
_REDUCTIONS = words(
    """
    reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor argmax argmin
    """
)
_CUMULATIVE = ["cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"]
# Zero stays zero, whatever the public operands are.
KEEPS_ZERO = words(
    """
    neg convert_element_type reshape transpose squeeze broadcast_in_dim slice reduce_sum copy
    stop_gradient sharding_constraint
    """
)


def axes_of_outputs(eqn: Any, axes: Axes) -> Found:
    """Returns the axis of the examples in each output; None if rows may meet."""
    rule = _RULES.get(eqn.primitive.name)
    return None if rule is None else rule(eqn, axes)


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _only(axes: Axes) -> int:
    return next(axis for axis in axes if axis is not None)


def _elementwise(eqn: Any, axes: Axes) -> Found:
    (out,) = eqn.outvars
    found, rank = _only(axes), len(_shape(out))
    for atom, axis in zip(eqn.invars, axes, strict=True):
        if axis is None:
            continue
        # An axis of size one may be broadcast, but not that of the examples.
        same = axis == found and len(_shape(atom)) == rank
        if not same or _shape(atom)[axis] != _shape(out)[axis]:
            return None
    return [found]


def _broadcast(eqn: Any, axes: Axes) -> Found:
    axis, (operand, *_) = axes[0], eqn.invars
    if axis is None:
        return None
    target = eqn.params["broadcast_dimensions"][axis]
    same = _shape(operand)[axis] == eqn.params["shape"][target]
    return [target] if same else None


def _reshape(eqn: Any, axes: Axes) -> Found:
    axis, old, new = axes[0], _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    if axis is None or eqn.params.get("dimensions") is not None:
        return None
    before = math.prod(old[:axis])
    for place, size in enumerate(new):
        if size == old[axis] and math.prod(new[:place]) == before:
            return [place]
    return None


def _transpose(eqn: Any, axes: Axes) -> Found:
    return [list(eqn.params["permutation"]).index(_only(axes))]


def _squeeze(eqn: Any, axes: Axes) -> Found:
    axis = _only(axes)
    removed = [size % len(_shape(eqn.invars[0])) for size in eqn.params["dimensions"]]
    return None if axis in removed else [axis - sum(place < axis for place in removed)]


def _reduction(eqn: Any, axes: Axes) -> Found:
    axis, removed = _only(axes), eqn.params["axes"]
    if axis in removed or len(eqn.invars) != 1:
        return None
    return [axis - sum(place < axis for place in removed)]


def _cumulative(eqn: Any, axes: Axes) -> Found:
    return None if eqn.params["axis"] == _only(axes) else [_only(axes)]


def _slice(eqn: Any, axes: Axes) -> Found:
    axis = _only(axes)
    steps = eqn.params["strides"] or (1,) * (axis + 1)
    whole = (
        eqn.params["start_indices"][axis] == 0
        and eqn.params["limit_indices"][axis] == _shape(eqn.invars[0])[axis]
        and steps[axis] == 1
    )
    return [axis] if whole else None


def _dynamic_slice(eqn: Any, axes: Axes) -> Found:
    operand, axis = eqn.invars[0], axes[0]
    # A window of the full size can only start at zero.
    if axis is None or any(place is not None for place in axes[1:]):
        return None
    return [axis] if eqn.params["slice_sizes"][axis] == _shape(operand)[axis] else None


def _concatenate(eqn: Any, axes: Axes) -> Found:
    # A public part has the size of the batch too, so its row i is a public number of row i.
    axis = _only(axes)
    same = all(place in (None, axis) for place in axes)
    return [axis] if same and eqn.params["dimension"] != axis else None


def _pad(eqn: Any, axes: Axes) -> Found:
    axis = axes[0]
    if axis is None or axes[1] is not None:
        return None
    return [axis] if tuple(eqn.params["padding_config"][axis]) == (0, 0, 0) else None


def _rev(eqn: Any, axes: Axes) -> Found:
    return None if _only(axes) in eqn.params["dimensions"] else [_only(axes)]


def _sort(eqn: Any, axes: Axes) -> Found:
    axis = _only(axes)
    same = all(place in (None, axis) for place in axes)
    return [axis] * len(eqn.outvars) if same and eqn.params["dimension"] != axis else None


def _top_k(eqn: Any, axes: Axes) -> Found:
    axis, last = _only(axes), len(_shape(eqn.invars[0])) - 1
    return [axis] * len(eqn.outvars) if axis != eqn.params.get("axis", last) % (last + 1) else None


def _split(eqn: Any, axes: Axes) -> Found:
    return None if eqn.params["axis"] == _only(axes) else [_only(axes)] * len(eqn.outvars)


def _stack(eqn: Any, axes: Axes) -> Found:
    axis, new = _only(axes), eqn.params["axis"]
    return [axis + (new <= axis)] if all(place in (None, axis) for place in axes) else None


def _unstack(eqn: Any, axes: Axes) -> Found:
    axis, gone = _only(axes), eqn.params["axis"]
    return None if gone == axis else [axis - (gone < axis)] * len(eqn.outvars)


def _dot_general(eqn: Any, axes: Axes) -> Found:
    contracting, batched = eqn.params["dimension_numbers"]
    if len(eqn.invars) != 2:
        return None
    places = []
    for side, axis in enumerate(axes):
        if axis is None:
            continue
        if axis in contracting[side]:
            return None
        if axis in batched[side]:
            places.append(list(batched[side]).index(axis))
            continue
        used = {*contracting[side], *batched[side]}
        free = [place for place in range(len(_shape(eqn.invars[side]))) if place not in used]
        before = len(batched[0]) + free.index(axis)
        if side == 1:
            left = len(_shape(eqn.invars[0])) - len(batched[0]) - len(contracting[0])
            before += left
        places.append(before)
    return [places[0]] if len(set(places)) == 1 else None


def _convolution(eqn: Any, axes: Axes) -> Found:
    numbers = eqn.params["dimension_numbers"]
    images, kernel = axes
    whole = eqn.params["batch_group_count"] == 1
    if kernel is not None or not whole or images != numbers.lhs_spec[0]:
        return None
    return [numbers.out_spec[0]]


def _gather(eqn: Any, axes: Axes) -> Found:
    operand, indices = axes
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    rank = len(_shape(eqn.outvars[0]))
    # Where the axes of `indices` are in the output; its last axis holds the index itself.
    batch_places = [place for place in range(rank) if place not in numbers.offset_dims]
    found = []
    if indices is not None:
        if indices >= len(batch_places):
            return None
        found.append(batch_places[indices])
    if operand is not None:
        batching = tuple(numbers.operand_batching_dims)
        if operand in batching:
            place = numbers.start_indices_batching_dims[batching.index(operand)]
            found.append(batch_places[place])
        elif (
            operand in numbers.collapsed_slice_dims
            or indices is not None
            or sizes[operand] != _shape(eqn.invars[0])[operand]
        ):
            return None
        else:
            removed = {*numbers.collapsed_slice_dims, *batching}
            kept = [place for place in range(len(sizes)) if place not in removed]
            found.append(numbers.offset_dims[kept.index(operand)])
    return [found[0]] if len(set(found)) == 1 else None


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_CUMULATIVE, _cumulative),
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "concatenate": _concatenate,
    "pad": _pad,
    "rev": _rev,
    "sort": _sort,
    "top_k": _top_k,
    "split": _split,
    "stack": _stack,
    "unstack": _unstack,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "gather": _gather,
}
