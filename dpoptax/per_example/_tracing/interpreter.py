"""Jaxpr interpreter: runs a loss equation by equation and follows its parameters.

The walker runs every equation. It calls a visitor where a parameter meets data, and where a
parameter is used in a way that it cannot follow. It also carries two kinds of values through scans,
branches and checkpoints: taps, which are extra inputs, and saved operands, which are extra outputs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from dpoptax import _jax_compat
from dpoptax.per_example._primitives import LinearPrimitive, linear_in, needs_own_run, run_equation
from dpoptax.per_example._tracing.site import EqnPath, Scan
from dpoptax.per_example._tracing.taps import Saved, Taps, following_additions, tap
from dpoptax.per_example._tracing.tracked_params import (
    ParamSlice,
    TrackedParam,
    slices_after,
    value_of,
    with_value,
)


class LinearUse(NamedTuple):
    """An equation that is linear in a tracked parameter, and one of the leaves in the parameter.

    Attributes:
        path: of the equation; the number of the leaf's slice follows if there are several.
        eqn: the equation.
        linear: the table entry of its primitive.
        position: which operand is the parameter.
        parameter: shape and dtype of the whole operand.
        part: the leaf, and its place in the operand.
        tap: the equation with the same cotangent after which to tap.
        in_cond: whether a `cond` decides if the equation runs.
        in_checkpoint: whether `jax.checkpoint` runs the equation again in the backward pass.
        source: the user's line.
    """

    path: EqnPath
    eqn: Any
    linear: LinearPrimitive
    position: int
    parameter: jax.ShapeDtypeStruct
    part: ParamSlice
    tap: EqnPath
    in_cond: bool
    in_checkpoint: bool
    source: str


@runtime_checkable
class Visitor(Protocol):
    """What a walk of a jaxpr is for."""

    def linear_use(self, use: LinearUse, operands: tuple[Any, ...]) -> Saved:
        """Visits a linear use; returns what to save of its operands, if anything."""

    def run_linear_use(
        self, uses: Sequence[LinearUse], values: Sequence[Any], taps: Taps
    ) -> tuple[list[Any], Saved]:
        """Runs the equation of these uses; returns its outputs and what to save of the run."""

    def fall_back(self, leaf: int, reason: str) -> None:
        """Visits a use that cannot be followed: the leaf needs plain differentiation."""

    def other_equation(self, eqn: Any) -> None:
        """Visits an equation that runs as it is, without a tracked parameter."""

    def zeros_to_save(self, path: EqnPath, depth: int) -> Saved:
        """Returns zeros for all that the equations under a path save, inside `depth` scans."""


@dataclasses.dataclass(frozen=True)
class Walker:
    """Runs jaxprs with tracked parameters among their inputs.

    Attributes:
        visitor: what the walk is for.
        taps: the taps of the equations in this jaxpr.
        depth: how many scans are around this jaxpr.
        caller: the user's line that called this jaxpr.
        in_cond: whether a `cond` is around this jaxpr.
        in_checkpoint: whether `jax.checkpoint` is around this jaxpr.
    """

    visitor: Visitor
    taps: Taps
    depth: int = 0
    caller: str = "a line inside a library"
    in_cond: bool = False
    in_checkpoint: bool = False

    def run(self, jaxpr: Any, values: Sequence[Any], path: EqnPath) -> tuple[list[Any], Saved]:
        """Returns the outputs, which may be tracked parameters, and the saved operands."""
        variables, constants = _jax_compat.inputs_of(jaxpr)
        environment = dict(zip(variables, [*constants, *values], strict=True))

        def read(atom: Any) -> Any:
            return atom.val if _jax_compat.is_literal(atom) else environment[atom]

        additions = following_additions(jaxpr)
        saved: Saved = {}
        for number, eqn in enumerate(jaxpr.eqns):
            here = (*path, number)
            # The context holds settings such as the mesh and the precision of matrix products.
            with eqn.ctx.manager:
                inputs = [read(atom) for atom in eqn.invars]
                tap_path = (*path, additions.get(number, number))
                outputs, saved_here = self._equation(here, tap_path, eqn, inputs)
            if here in self.taps:
                outputs = [tap(outputs[0], self.taps[here])]
            saved |= saved_here
            environment.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars], saved

    def untrack(self, values: Sequence[Any], reason: str) -> list[Any]:
        """Returns plain values; the leaves of tracked parameters fall back."""
        for value in values:
            for part in value.slices if isinstance(value, TrackedParam) else ():
                self.visitor.fall_back(part.leaf, reason)
        return [value_of(value) for value in values]

    def _equation(
        self, path: EqnPath, tap_path: EqnPath, eqn: Any, values: list[Any]
    ) -> tuple[list[Any], Saved]:
        # First equations that hold a jaxpr, which may use the parameter inside, then single ones.
        tracked = [i for i, value in enumerate(values) if isinstance(value, TrackedParam)]
        if not tracked and not needs_own_run(_jax_compat.equations_inside(eqn)):
            self.visitor.other_equation(eqn)
            return run_equation(eqn, values), {}
        if (jaxpr := _jax_compat.called_jaxpr(eqn)) is not None:
            inside = dataclasses.replace(self, caller=self._source(eqn))
            return inside.run(jaxpr, values, path)
        if eqn.primitive is jax.lax.scan_p:
            return self._scan(path, eqn, values)
        # A branch by platform is chosen when the program is compiled, and has no index here.
        if eqn.primitive is jax.lax.cond_p and eqn.params.get("branches_platforms") is None:
            return self._cond(path, eqn, values)
        if (params := _jax_compat.checkpoint_params(eqn)) is not None:
            return self._checkpoint(path, eqn, params, values)
        # With a tracked parameter on both sides the equation is a product of parameters.
        linear = linear_in(eqn, tracked[0]) if len(tracked) == 1 else None
        if linear is not None:
            return self._linear_use(path, tap_path, eqn, linear, values)
        if (slices := slices_after(eqn, values)) is not None:
            (output,) = _jax_compat.bind(eqn, list(map(value_of, values)))
            return [TrackedParam(output, slices)], {}
        self.visitor.other_equation(eqn)
        reason = f"used by {eqn.primitive.name} at {self._source(eqn)}"
        return run_equation(eqn, self.untrack(values, reason)), {}

    def _linear_use(
        self,
        path: EqnPath,
        tap_path: EqnPath,
        eqn: Any,
        linear: LinearPrimitive,
        values: list[Any],
    ) -> tuple[list[Any], Saved]:
        (position,) = (i for i, value in enumerate(values) if isinstance(value, TrackedParam))
        param = values[position]
        operands = tuple(values[i] for i in linear.saved_operands[position])
        spec = jax.ShapeDtypeStruct(param.value.shape, param.value.dtype)
        # One site per leaf: concatenated leaves share the equation, each with its own windows.
        saved: Saved = {}
        uses = []
        for number, part in enumerate(param.slices):
            use = LinearUse(
                path=(*path, number) if param.is_concatenated else path,
                eqn=eqn,
                linear=linear,
                position=position,
                parameter=spec,
                part=part,
                tap=tap_path,
                in_cond=self.in_cond,
                in_checkpoint=self.in_checkpoint,
                source=self._source(eqn),
            )
            saved |= self.visitor.linear_use(use, operands)
            uses.append(use)
        outputs, of_run = self.visitor.run_linear_use(uses, list(map(value_of, values)), self.taps)
        return outputs, saved | of_run

    def _scan(self, path: EqnPath, eqn: Any, values: list[Any]) -> tuple[list[Any], Saved]:
        length, source = eqn.params["length"], self._source(eqn)
        num_consts, num_carry = _jax_compat.scan_counts(eqn)
        num_carried = num_consts + num_carry
        consts, carry, xs = (
            values[:num_consts],
            values[num_consts:num_carried],
            values[num_carried:],
        )
        # The carry changes from step to step, so a parameter in it is no longer a parameter.
        carry = self.untrack(carry, f"carried by a scan at {source}")
        # A slice by the scan could cut through the windows of a concatenated parameter.
        if any(isinstance(x, TrackedParam) and x.is_concatenated for x in xs):
            xs = self.untrack(xs, f"concatenated and sliced by a scan at {source}")

        def inside(value: Any, inner: Any, *, sliced: bool) -> Any:
            if not isinstance(value, TrackedParam):
                return inner
            scan = Scan(length, sliced)
            return TrackedParam(inner, tuple(part.inside(scan) for part in value.slices))

        # A step may save one array for several sites, such as an input that several gates share.
        # It is stacked once: `places` says which output of the scan belongs to which site.
        places: dict[EqnPath, tuple[int, ...]] = {}

        def body(carry: list[Any], slices: Any) -> Any:
            slice_values, taps = slices
            walker = dataclasses.replace(self, taps=taps, depth=self.depth + 1, caller=source)
            inputs = [
                *(inside(value, value_of(value), sliced=False) for value in consts),
                *carry,
                *(inside(x, value, sliced=True) for x, value in zip(xs, slice_values, strict=True)),
            ]
            outputs, saved = walker.run(eqn.params["jaxpr"], inputs, path)
            # Following outputs out of the scan would need their slices stacked again.
            outputs = walker.untrack(outputs, f"returned by a scan at {source}")
            unique = {id(value): value for value in jax.tree.leaves(saved)}
            numbers = {identity: number for number, identity in enumerate(unique)}
            places.update(
                (site, tuple(numbers[id(value)] for value in operands))
                for site, operands in saved.items()
            )
            return outputs[:num_carry], (outputs[num_carry:], list(unique.values()))

        carry, (ys, stacked) = jax.lax.scan(
            body,
            carry,
            (list(map(value_of, xs)), self._taps_under(path)),
            length=length,
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )
        saved = {site: tuple(stacked[i] for i in place) for site, place in places.items()}
        return [*carry, *ys], saved

    def _cond(self, path: EqnPath, eqn: Any, values: list[Any]) -> tuple[list[Any], Saved]:
        # Under vmap a branch runs for every example, and so may spread NaN as a plain equation.
        self.visitor.other_equation(eqn)
        (index,) = self.untrack(values[:1], "it decides a cond")
        operands, source = values[1:], self._source(eqn)

        def branch(number: int, jaxpr: Any) -> Callable[[list[Any]], Any]:
            def run(arrays: list[Any]) -> Any:
                walker = dataclasses.replace(
                    self, taps=self._taps_under(path), caller=source, in_cond=True
                )
                inputs = list(map(with_value, operands, arrays))
                outputs, saved = walker.run(jaxpr, inputs, (*path, number))
                outputs = walker.untrack(outputs, f"returned by a cond at {source}")
                # All branches must return the same arrays.
                return outputs, self.visitor.zeros_to_save(path, self.depth) | saved

            return run

        branches = [branch(i, jaxpr) for i, jaxpr in enumerate(eqn.params["branches"])]
        outputs, saved = jax.lax.switch(index, branches, list(map(value_of, operands)))
        return list(outputs), saved

    def _checkpoint(
        self, path: EqnPath, eqn: Any, params: dict[str, Any], values: list[Any]
    ) -> tuple[list[Any], Saved]:
        source = self._source(eqn)

        def run(arrays: list[Any], taps: Taps) -> Any:
            walker = dataclasses.replace(self, taps=taps, caller=source, in_checkpoint=True)
            inputs = list(map(with_value, values, arrays))
            outputs, saved = walker.run(params["jaxpr"], inputs, path)
            return walker.untrack(outputs, f"returned by a checkpoint at {source}"), saved

        # `prevent_cse` may be one bool per argument. The arguments here are others, so take one.
        prevent_cse = params["prevent_cse"]
        prevent_cse = any(prevent_cse) if isinstance(prevent_cse, tuple) else prevent_cse
        again = jax.checkpoint(run, prevent_cse=prevent_cse, policy=params["policy"])
        return again(list(map(value_of, values)), self._taps_under(path))

    def _taps_under(self, path: EqnPath) -> Taps:
        return {key: value for key, value in self.taps.items() if key[: len(path)] == path}

    def _source(self, eqn: Any) -> str:
        """The user's line: the innermost frame outside JAX, Flax and this package."""
        if eqn.source_info.traceback is not None:
            # Frames are innermost first.
            libraries = ("/site-packages/", "/dpoptax/per_example/")
            for frame in eqn.source_info.traceback.frames:
                if not any(part in frame.file_name for part in libraries):
                    return f"{frame.file_name}:{frame.line_num}"
        return self.caller
