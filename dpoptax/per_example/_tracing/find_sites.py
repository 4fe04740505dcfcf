"""The loss of one example in; the places where its parameters meet data out.

The loss is traced once to a jaxpr, which is then run equation by equation. A parameter leaf, seen
through steps that only move its numbers about, meets data in an equation that is linear in it: a
*site*. At a site the input is kept and the output is tapped, so that one backward pass gives the
cotangent of every output, and the gradient of the parameter, input times cotangent, need never
be formed per example. A leaf with a use that is not understood is left to plain differentiation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, PyTree

from dpoptax.per_example._primitives import linear_primitive
from dpoptax.per_example._primitives.convolution import CONVOLUTION
from dpoptax.per_example._tracing.concatenated import Window, cut_spec
from dpoptax.per_example._tracing.interpreter import Interpreter, Meeting
from dpoptax.per_example._tracing.site import EqnPath, Site
from dpoptax.per_example._tracing.tracked_params import Part, Weight


class Trace(NamedTuple):
    """What one tracing of a loss found.

    Attributes:
        jaxpr: of `(leaves, rest) -> loss`.
        sites: in the order of the program.
        stacked: why a leaf is left to plain differentiation, by its number.
        loose_convolution: whether a convolution stands anywhere but at a site, or at one of a leaf
            that is left to plain differentiation.
    """

    jaxpr: Any
    sites: tuple[Site, ...]
    stacked: dict[int, str]
    loose_convolution: bool


def trace(loss_of_leaves: Callable[..., Array], leaves: list[Any], rest: PyTree) -> Trace:
    """Finds the sites of `loss_of_leaves(leaves, rest)`; computes nothing.

    Args:
        loss_of_leaves: the scalar loss of one example.
        leaves: the parameters, or their shapes and dtypes.
        rest: the example and its key, or their shapes and dtypes.

    Returns:
        The jaxpr, and where each leaf is used in it.
    """
    closed = jax.make_jaxpr(loss_of_leaves)(leaves, rest)
    found: dict[EqnPath, Site] = {}
    stacked: dict[int, str] = {}
    loose: list[bool] = []
    convolved: set[int] = set()

    def meet(meeting: Meeting) -> None:
        eqn, part = meeting.eqn, meeting.part
        if eqn.primitive is CONVOLUTION.primitive:
            convolved.add(part.leaf)
        linear = linear_primitive(eqn.primitive)
        assert linear is not None
        saved = [eqn.invars[i].aval for i in linear.saved_operands[meeting.position]]
        operand_windows: tuple[Window, ...] = (None,) * len(saved)
        output_window: Window = None
        if part.window is not None:
            if linear.windows is None:
                name = eqn.primitive.name
                stacked.setdefault(part.leaf, f"joined and used by {name} at {meeting.source}")
                return
            operand_windows, output_window = linear.windows(eqn, meeting.position, part.window)
        output = eqn.outvars[0].aval
        found[meeting.key] = Site(
            path=meeting.key,
            leaf=part.leaf,
            steps=part.steps,
            scans=part.scans,
            primitive=eqn.primitive,
            params=eqn.params,
            position=meeting.position,
            parameter=cut_spec(meeting.weight, part.window),
            operands=tuple(map(cut_spec, saved, operand_windows)),
            operand_windows=operand_windows,
            output=cut_spec(output, output_window),
            output_window=output_window,
            tap=meeting.tap,
            tap_output=cut_spec(output, None),
            source=meeting.source,
        )

    def bound(eqn: Any) -> None:
        loose.append(CONVOLUTION.primitive.name in str(eqn))

    def run(*values: Array) -> None:
        program = Interpreter(meet, stacked.setdefault, bound, {}, {}, {}, depth=0)
        weights = [Weight(value, (Part(i),)) for i, value in enumerate(values[: len(leaves)])]
        outputs = program.run(closed, [*weights, *values[len(leaves) :]], ())
        program.plain(outputs, "it is the loss itself")

    jax.eval_shape(run, *jax.tree.leaves((leaves, rest)))
    sites = tuple(found[key] for key in sorted(found) if found[key].leaf not in stacked)
    used = {site.leaf for site in sites}
    for leaf in range(len(leaves)):
        if leaf not in used:
            stacked.setdefault(leaf, "the loss does not depend on it")
    return Trace(closed, sites, stacked, any(loose) or not convolved.isdisjoint(stacked))


def run_with_taps(
    found: Trace, leaves: list[Any], rest: list[Any], taps: dict[EqnPath, Array]
) -> tuple[Array, dict[EqnPath, tuple[Any, ...]]]:
    """Runs the loss; returns it and the inputs kept at every site.

    The derivative with respect to `taps[site.tap]` is the cotangent of the output of that site.
    The values of the taps are never read.

    Args:
        found: of `trace`.
        leaves: the parameters; those with sites are constants here.
        rest: the flat example and key.
        taps: one array per tap, shaped by `sites.tap_spec`.

    Returns:
        The scalar loss, and by site the other operands, with a leading axis per scan around it.
    """

    def refuse(leaf: int, reason: str) -> None:
        if leaf not in found.stacked:
            raise AssertionError(f"leaf {leaf} has a use that tracing did not see: {reason}")

    kept: dict[EqnPath, tuple[Any, ...]] = {}
    sites = {site.path: site for site in found.sites}
    values = [Weight(value, (Part(i),)) for i, value in enumerate(leaves)]
    program = Interpreter(
        lambda meeting: None, refuse, lambda eqn: None, sites, taps, kept, depth=0
    )
    (loss,) = program.run(found.jaxpr, [*values, *rest], ())
    (value,) = program.plain([loss], "it is the loss itself")
    return value, kept


def has_convolution(loss_fn: Callable[..., Array], params: PyTree, inputs: PyTree) -> bool:
    """Whether a convolution stands anywhere in the loss of one example."""
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), inputs)
    return CONVOLUTION.primitive.name in str(jax.make_jaxpr(loss_fn)(params, *one))
