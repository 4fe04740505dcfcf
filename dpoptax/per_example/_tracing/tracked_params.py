"""The value of a parameter inside a program, followed through equations that only move it about.

A weight may be several leaves joined side by side, as a recurrent cell joins its gates; each is
then a part of the whole, shown by a window, and meets its own part of the data.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from dpoptax.per_example._tracing.site import Level, Step, Window

# Equations that give the numbers of one operand in another order or precision, or repeat or drop
# some of them.
MOVES = {
    "reshape",
    "transpose",
    "broadcast_in_dim",
    "squeeze",
    "expand_dims",
    "rev",
    "slice",
    "convert_element_type",
    "copy",
}
# Equations that are linear in a weight, with the positions at which one may stand.
MEETINGS = {"dot_general": (0, 1), "conv_general_dilated": (1,), "gather": (0,), "add": (0, 1)}
# Of these, the ones whose derivative needs no input.
KEEPS_NOTHING = {"add"}


@dataclasses.dataclass(frozen=True)
class Part:
    """One leaf in a weight.

    Attributes:
        leaf: its number.
        steps: that led to the weight.
        levels: the scans around, outermost first.
        window: where in the weight it stands; None if it is the whole.
    """

    leaf: int
    steps: tuple[Step, ...] = ()
    levels: tuple[Level, ...] = ()
    window: Window = None

    def moved(self, step: Step, window: Window = None) -> "Part":
        """The part after one more step."""
        return dataclasses.replace(self, steps=(*self.steps, step), window=window)

    def entered(self, level: Level) -> "Part":
        """The part inside a scan."""
        steps = (*self.steps, Step(None, {})) if level.sliced else self.steps
        return dataclasses.replace(self, steps=steps, levels=(*self.levels, level))


@dataclasses.dataclass(frozen=True)
class Weight:
    """An array that is a leaf, or several side by side."""

    value: Any
    parts: tuple[Part, ...]

    @property
    def joined(self) -> bool:
        """Whether any part has a window."""
        return any(part.window is not None for part in self.parts)


def moved(eqn: Any, weight: Weight) -> tuple[Part, ...] | None:
    """The parts of a weight after an equation that moves it; None if it does more than that."""
    if eqn.primitive.name not in MOVES:
        return None
    (output,) = eqn.outvars
    if not jnp.issubdtype(output.aval.dtype, jnp.floating):
        return None
    parts = []
    for part in weight.parts:
        after = _move_part(eqn, part)
        if after is None:
            return None
        parts.append(after)
    return tuple(parts)


def joined(eqn: Any, weights: Sequence[Weight]) -> tuple[Part, ...] | None:
    """The parts of weights that `concatenate` joins; None where one is joined already."""
    if any(weight.joined for weight in weights):
        return None
    parts: list[Part] = []
    start, axis = 0, eqn.params["dimension"]
    for weight in weights:
        window = [(0, size) for size in weight.value.shape]
        window[axis] = (start, weight.value.shape[axis])
        start += weight.value.shape[axis]
        parts += [dataclasses.replace(part, window=tuple(window)) for part in weight.parts]
    return tuple(parts)


def windows_of_meeting(
    eqn: Any, position: int, window: Window
) -> tuple[tuple[Window, ...], Window] | None:
    """The parts of the other operands and of the output that a part of the weight meets.

    Args:
        eqn: linear in its operand at `position`.
        position: of the weight.
        window: of the part in the weight.

    Returns:
        One window per operand that the derivative needs, and that of the output; None where it
        is not known.
    """
    name = eqn.primitive.name
    others = [atom for i, atom in enumerate(eqn.invars) if i != position]
    needed: tuple[Window, ...] = () if name in KEEPS_NOTHING else (None,) * len(others)
    if window is None:
        return needed, None
    result = eqn.outvars[0].aval.shape
    if name == "add":  # an axis of size one is repeated
        sizes = eqn.invars[position].aval.shape
        pairs = zip(window, sizes, result, strict=True)
        return needed, tuple(part if size == n else (0, n) for part, size, n in pairs)
    if name != "dot_general":
        return None
    contracting, batch = eqn.params["dimension_numbers"]
    own, other = position, 1 - position
    operand = [(0, size) for size in others[0].aval.shape]
    output = [(0, size) for size in result]
    for axis, facing in zip(
        (*contracting[own], *batch[own]), (*contracting[other], *batch[other]), strict=True
    ):
        operand[facing] = window[axis]
    output[: len(batch[own])] = [window[axis] for axis in batch[own]]
    free = [axis for axis in range(len(window)) if axis not in (*contracting[own], *batch[own])]
    first = len(batch[own]) if own == 0 else len(output) - len(free)
    output[first : first + len(free)] = [window[axis] for axis in free]
    return (tuple(operand),), tuple(output)


def _move_part(eqn: Any, part: Part) -> Part | None:
    """The equation as it would be if the part stood alone."""
    name, params, window = eqn.primitive.name, eqn.params, part.window
    if window is None:
        return part.moved(Step(eqn.primitive, params))
    if name in ("convert_element_type", "copy"):
        return part.moved(Step(eqn.primitive, params), window)
    if name == "transpose":
        permuted = tuple(window[axis] for axis in params["permutation"])
        return part.moved(Step(eqn.primitive, params), permuted)
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if name == "broadcast_in_dim":
        axes = params["broadcast_dimensions"]
    elif name == "reshape" and [n for n in before if n > 1] == [n for n in after if n > 1]:
        places = iter(axis for axis, size in enumerate(after) if size > 1)
        axes = [next(places) if size > 1 else None for size in before]
    else:
        return None
    moved_window = [(0, size) for size in after]
    for axis, place in enumerate(axes):
        if place is not None and before[axis] == after[place]:
            moved_window[place] = window[axis]
    sizes = tuple(size for _, size in moved_window)
    renamed = "new_sizes" if name == "reshape" else "shape"
    return part.moved(Step(eqn.primitive, {**params, renamed: sizes}), tuple(moved_window))
