"""Tracked parameters: parameter values followed through equations that only move numbers.

A tracked parameter may be several leaves side by side, see `concatenated`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpoptax.per_example._tracing.concatenated import (
    Window,
    move_window,
    windows_after_concatenation,
)
from dpoptax.per_example._tracing.site import Scan, Step

# Equations that reorder, repeat, drop or cast the numbers of one operand. Norm rules transpose
# them, so only add a primitive that is linear and has one operand.
_MOVES = {
    jax.lax.reshape_p,
    jax.lax.transpose_p,
    jax.lax.broadcast_in_dim_p,
    jax.lax.squeeze_p,
    jax.lax.rev_p,
    jax.lax.slice_p,
    jax.lax.convert_element_type_p,
    jax.lax.copy_p,
}


@dataclasses.dataclass(frozen=True)
class ParamSlice:
    """One leaf in a tracked parameter.

    Attributes:
        leaf: the number of the leaf.
        steps: the equations and scan slices from the leaf to here.
        scans: the scans around the value, outermost first.
        window: which part of the value is the leaf; None if it is the whole.
    """

    leaf: int
    steps: tuple[Step, ...] = ()
    scans: tuple[Scan, ...] = ()
    window: Window = None

    def moved(self, step: Step, window: Window) -> "ParamSlice":
        """The slice after one more step."""
        return dataclasses.replace(self, steps=(*self.steps, step), window=window)

    def inside(self, scan: Scan) -> "ParamSlice":
        """The slice inside a scan."""
        steps = (*self.steps, Step(None, {})) if scan.sliced else self.steps
        return dataclasses.replace(self, steps=steps, scans=(*self.scans, scan))


@dataclasses.dataclass(frozen=True)
class TrackedParam:
    """A value that is a leaf, or several leaves side by side."""

    value: Any
    slices: tuple[ParamSlice, ...]

    @property
    def is_concatenated(self) -> bool:
        """Whether any slice is a part of the value."""
        return any(part.window is not None for part in self.slices)


def value_of(value: Any) -> Any:
    """Returns the plain value of a tracked parameter, or of anything else."""
    return value.value if isinstance(value, TrackedParam) else value


def with_value(old: Any, value: Any) -> Any:
    """Returns a tracked parameter with another value, or the value if it was not tracked."""
    return dataclasses.replace(old, value=value) if isinstance(old, TrackedParam) else value


def slices_after(eqn: Any, values: Sequence[Any]) -> tuple[ParamSlice, ...] | None:
    """Returns the slices after an equation that only moves numbers; None for any other."""
    tracked = [value for value in values if isinstance(value, TrackedParam)]
    if len(tracked) == 1 and eqn.primitive in _MOVES:
        return _slices_after_move(eqn, tracked[0])
    if 1 < len(tracked) == len(values) and eqn.primitive is jax.lax.concatenate_p:
        return _slices_after_concatenation(eqn, tracked)
    return None


def _slices_after_move(eqn: Any, param: TrackedParam) -> tuple[ParamSlice, ...] | None:
    (output,) = eqn.outvars
    # A cast to integers has no derivative.
    if not jnp.issubdtype(output.aval.dtype, jnp.floating):
        return None
    slices = []
    for part in param.slices:
        step, window = Step(eqn.primitive, eqn.params), part.window
        if window is not None:
            if (moved := move_window(eqn, window)) is None:
                return None
            step, window = Step(eqn.primitive, moved[0]), moved[1]
        slices.append(part.moved(step, window))
    return tuple(slices)


def _slices_after_concatenation(
    eqn: Any, params: Sequence[TrackedParam]
) -> tuple[ParamSlice, ...] | None:
    if any(param.is_concatenated for param in params):
        return None
    shapes = [param.value.shape for param in params]
    windows = windows_after_concatenation(shapes, eqn.params["dimension"])
    return tuple(
        dataclasses.replace(part, window=window)
        for param, window in zip(params, windows, strict=True)
        for part in param.slices
    )
