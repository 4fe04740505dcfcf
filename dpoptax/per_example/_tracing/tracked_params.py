"""The value of a parameter inside a program, followed through equations that only move it about.

A weight may be several leaves joined side by side, as a recurrent cell joins its gates; each is
then a part of the whole, shown by a window, and meets its own part of the data.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from dpoptax.per_example._tracing.concatenated import (
    Window,
    move_window,
    windows_after_concatenation,
)
from dpoptax.per_example._tracing.site import Scan, Step

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


@dataclasses.dataclass(frozen=True)
class Part:
    """One leaf in a weight.

    Attributes:
        leaf: its number.
        steps: that led to the weight.
        scans: the scans around, outermost first.
        window: where in the weight it stands; None if it is the whole.
    """

    leaf: int
    steps: tuple[Step, ...] = ()
    scans: tuple[Scan, ...] = ()
    window: Window = None

    def moved(self, step: Step, window: Window = None) -> "Part":
        """The part after one more step."""
        return dataclasses.replace(self, steps=(*self.steps, step), window=window)

    def entered(self, scan: Scan) -> "Part":
        """The part inside a scan."""
        steps = (*self.steps, Step(None, {})) if scan.sliced else self.steps
        return dataclasses.replace(self, steps=steps, scans=(*self.scans, scan))


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
    shapes = [weight.value.shape for weight in weights]
    windows = windows_after_concatenation(shapes, eqn.params["dimension"])
    parts: list[Part] = []
    for weight, window in zip(weights, windows, strict=True):
        parts += [dataclasses.replace(part, window=window) for part in weight.parts]
    return tuple(parts)


def _move_part(eqn: Any, part: Part) -> Part | None:
    """The equation as it would be if the part stood alone."""
    if part.window is None:
        return part.moved(Step(eqn.primitive, eqn.params))
    if (found := move_window(eqn, part.window)) is None:
        return None
    params, window = found
    return part.moved(Step(eqn.primitive, params), window)
