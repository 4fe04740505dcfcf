"""Sites: the equations of a loss that are linear in a parameter."""

import dataclasses
import math
from typing import Any, NamedTuple, TypeAlias

import jax

from dpoptax.per_example._tracing.concatenated import Window

# The number of an equation in its jaxpr, after the numbers of the equations around that jaxpr.
EqnPath: TypeAlias = tuple[int, ...]


class Step(NamedTuple):
    """One equation on the way from a leaf to a site; `primitive` is None where a scan slices."""

    primitive: Any
    params: dict[str, Any]


class Scan(NamedTuple):
    """A scan around a site: its length, and whether it slices the parameter or shares it."""

    length: int
    sliced: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """An equation that is linear in one parameter leaf, or in a part of it.

    Attributes:
        path: which equation it is. For concatenated parameters, the number of the part follows.
        leaf: the number of the leaf.
        steps: the equations and scan slices from the leaf to the operand of this equation.
        scans: the scans around the equation, outermost first.
        primitive: the JAX primitive of the equation.
        params: the params of the equation.
        position: which operand is the parameter.
        parameter: shape and dtype of that operand, or of the leaf's window in it.
        operands: shapes and dtypes of the saved operands, those that the derivative needs.
        operand_windows: for concatenated parameters, the windows of the saved operands.
        output: shape and dtype of the output, or of its window.
        output_window: for concatenated parameters, the window of the output.
        tap: the equation after which the cotangent is read: this one, or the last of a chain of
            additions that follows it.
        tap_output: shape and dtype of that equation's output.
        in_cond: whether a `cond` decides if the equation runs.
        in_checkpoint: whether `jax.checkpoint` runs the equation again in the backward pass.
        source: the user's line.
        before_sum: for a use whose gradient is summed where it arises, the site with its factors.
    """

    path: EqnPath
    leaf: int
    steps: tuple[Step, ...]
    scans: tuple[Scan, ...]
    primitive: Any
    params: dict[str, Any]
    position: int
    parameter: jax.ShapeDtypeStruct
    operands: tuple[jax.ShapeDtypeStruct, ...]
    operand_windows: tuple[Window, ...]
    output: jax.ShapeDtypeStruct
    output_window: Window
    tap: EqnPath
    tap_output: jax.ShapeDtypeStruct
    in_cond: bool
    in_checkpoint: bool
    source: str
    before_sum: "Site | None" = None

    @property
    def equation(self) -> "Site":
        """The site as its equation is, with all factors."""
        return self.before_sum or self

    @property
    def num_runs(self) -> int:
        """How many times the scans around the equation run it."""
        return math.prod(scan.length for scan in self.scans)

    @property
    def num_slices(self) -> int:
        """How many slices of the leaf the scans make."""
        return math.prod(scan.length for scan in self.scans if scan.sliced)

    @property
    def num_uses(self) -> int:
        """How many times the scans use each number of the leaf."""
        return math.prod(scan.length for scan in self.scans if not scan.sliced)

    @property
    def num_floats(self) -> int:
        """How many numbers the factored form holds per example: operands and cotangent."""
        return self.num_runs * sum(math.prod(spec.shape) for spec in (*self.operands, self.output))

    def preserves_norms(self, spec: jax.ShapeDtypeStruct) -> bool:
        """Whether each number of the leaf is used exactly once, so that norms are the leaf's."""
        # A slice may drop as many numbers as a broadcast repeats, so counting is not enough.
        if any(step.primitive is jax.lax.slice_p for step in self.steps):
            return False
        return math.prod(self.parameter.shape) * self.num_slices == math.prod(spec.shape)


def tap_spec(site: Site) -> jax.ShapeDtypeStruct:
    """Returns the shape of a site's tap and cotangent: the scan axes, then the output's."""
    lengths = tuple(scan.length for scan in site.scans)
    return jax.ShapeDtypeStruct((*lengths, *site.tap_output.shape), site.tap_output.dtype)
