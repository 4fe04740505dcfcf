"""What is known of a place where a parameter meets data."""

import dataclasses
import math
from typing import Any, NamedTuple, TypeAlias

import jax
from jaxtyping import Array

CONVOLUTION = "conv_general_dilated"

# Where an equation stands: its number in the jaxpr, and in the jaxprs around it.
Key: TypeAlias = tuple[int, ...]
# A part of an array: along every axis where it starts, and its size. None is the whole.
Window: TypeAlias = tuple[tuple[int, int], ...] | None


class Step(NamedTuple):
    """One equation on the way from a leaf to a site; `primitive` is None where a scan slices."""

    primitive: Any
    params: dict[str, Any]


class Level(NamedTuple):
    """A scan around a site: its length, and whether it slices the weight or shares it."""

    length: int
    sliced: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """An equation that is linear in one leaf, or in a part of it.

    Attributes:
        key: where it stands.
        leaf: the number of the leaf.
        steps: from the leaf to the weight, slices by scans included.
        levels: the scans around it, outermost first.
        primitive: of the equation.
        params: of the equation.
        position: of the weight among the operands.
        weight: shape and dtype of what the leaf is in the equation.
        operands: shapes and dtypes of the others, as far as the derivative needs them.
        operand_windows: the parts of the others that meet the weight, where it is joined to more.
        output: shape and dtype of the result.
        output_window: the part of the result that the weight moves.
        tap: key of the equation that is tapped: the site's own, or the last of the additions that
            its output goes into and nothing else; their cotangents are one.
        tapped: shape and dtype of the result of that equation.
        source: the user's line.
    """

    key: Key
    leaf: int
    steps: tuple[Step, ...]
    levels: tuple[Level, ...]
    primitive: Any
    params: dict[str, Any]
    position: int
    weight: jax.ShapeDtypeStruct
    operands: tuple[jax.ShapeDtypeStruct, ...]
    operand_windows: tuple[Window, ...]
    output: jax.ShapeDtypeStruct
    output_window: Window
    tap: Key
    tapped: jax.ShapeDtypeStruct
    source: str

    @property
    def numbers(self) -> int:
        """How many numbers are kept of it per example: its operands and its cotangent."""
        scans = math.prod(level.length for level in self.levels)
        return scans * sum(math.prod(spec.shape) for spec in (*self.operands, self.output))

    def isometric(self, spec: jax.ShapeDtypeStruct) -> bool:
        """Whether the steps give every number of the leaf once, so that norms are the leaf's."""
        # Where some are dropped, as many may be repeated.
        if any(
            step.primitive is not None and step.primitive.name == "slice" for step in self.steps
        ):
            return False
        sliced = math.prod(level.length for level in self.levels if level.sliced)
        return math.prod(self.weight.shape) * sliced == math.prod(spec.shape)


def tap_spec(site: Site) -> jax.ShapeDtypeStruct:
    """The shape of a site's tap and its cotangent: the scans around it, then the output."""
    lengths = tuple(level.length for level in site.levels)
    return jax.ShapeDtypeStruct((*lengths, *site.tapped.shape), site.tapped.dtype)


def cut(value: Array, window: Window) -> Array:
    """The part of the last axes of `value` that a window shows."""
    if window is None:
        return value
    return value[(..., *(slice(start, start + size) for start, size in window))]


def cut_spec(value: Any, window: Window) -> jax.ShapeDtypeStruct:
    """The shape and dtype of that part."""
    shape = value.shape if window is None else tuple(size for _, size in window)
    return jax.ShapeDtypeStruct(shape, value.dtype)
