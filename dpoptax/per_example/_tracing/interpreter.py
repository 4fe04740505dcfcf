"""A jaxpr and its inputs in, its outputs out; whoever runs it is told where weights meet data.

This is the one file that runs jaxprs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jaxtyping import Array

from dpoptax.per_example._primitives import linear_primitive
from dpoptax.per_example._tracing.concatenated import cut
from dpoptax.per_example._tracing.site import EqnPath, Scan, Site
from dpoptax.per_example._tracing.tracked_params import Part, Weight, joined, moved

# Equations that only wrap a jaxpr.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
REMATS = {"remat", "remat2", "checkpoint"}


def evaluate(jaxpr: Any, constants: Sequence[Any], values: Sequence[Any]) -> Array:
    """Runs the jaxpr of a loss; returns the scalar."""
    (loss,) = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, list(constants)))(*values)
    return loss


@jax.custom_vjp
def tap(output: Array, tap: Array) -> Array:
    """`output`; the derivative with respect to `tap` is the cotangent of it."""
    return output


tap.defvjp(lambda output, tap: (output, None), lambda _, cotangent: (cotangent, cotangent))


class Meeting(NamedTuple):
    """An equation that is linear in a weight, and one leaf of that weight.

    Attributes:
        key: of the site that it may become.
        eqn: the equation.
        position: of the weight among the operands.
        weight: shape and dtype of the weight, which may be joined of more leaves.
        part: the leaf, and where in the weight it stands.
        tap: key of the equation whose cotangent is that of the output.
        source: the user's line.
    """

    key: EqnPath
    eqn: Any
    position: int
    weight: jax.ShapeDtypeStruct
    part: Part
    tap: EqnPath
    source: str


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """Runs a jaxpr whose inputs may be weights.

    Attributes:
        meet: told of every place where a weight meets data.
        demote: what to do where a use is not understood, given the leaf and the reason.
        bound: told of every equation that is no site and is run as it is.
        sites: by key; empty while they are being found.
        taps: by key, for the sites in this jaxpr.
        kept: by key, filled with the operands of the sites in this jaxpr.
        depth: how many scans are around this jaxpr.
        successors: of an equation of this jaxpr, the addition that alone uses its output.
        caller: the user's line that called this jaxpr.
    """

    meet: Callable[[Meeting], Any]
    demote: Callable[[int, str], Any]
    bound: Callable[[Any], None]
    sites: dict[EqnPath, Site]
    taps: dict[EqnPath, Array]
    kept: dict[EqnPath, tuple[Any, ...]]
    depth: int
    successors: dict[int, int] = dataclasses.field(default_factory=dict)
    caller: str = "a line inside a library"

    def source(self, eqn: Any) -> str:
        """The user's line of an equation."""
        return _source(eqn) or self.caller

    def run(self, closed: Any, values: Sequence[Any], prefix: EqnPath) -> list[Any]:
        """Runs every equation; outputs may be weights."""
        jaxpr = getattr(closed, "jaxpr", closed)
        environment = dict(
            zip(
                [*jaxpr.constvars, *jaxpr.invars],
                [*getattr(closed, "consts", ()), *values],
                strict=True,
            )
        )

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex.Literal) else environment[atom]

        inside = dataclasses.replace(self, successors=_successors(jaxpr))
        for number, eqn in enumerate(jaxpr.eqns):
            key = (*prefix, number)
            with eqn.ctx.manager:
                outputs = inside._equation(key, eqn, [read(v) for v in eqn.invars])
            if key in self.taps:
                outputs = [tap(outputs[0], self.taps[key])]
            environment.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def plain(self, values: Sequence[Any], reason: str) -> list[Any]:
        """Turns weights into values, and gives up on their leaves."""
        for value in values:
            for part in value.parts if isinstance(value, Weight) else ():
                self.demote(part.leaf, reason)
        return [value.value if isinstance(value, Weight) else value for value in values]

    def _equation(self, key: EqnPath, eqn: Any, values: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        weights = [i for i, value in enumerate(values) if isinstance(value, Weight)]
        if weights and name in CALLS:
            inside = dataclasses.replace(self, caller=self.source(eqn))
            return inside.run(eqn.params[CALLS[name]], values, key)
        if weights and name == "scan":
            return self._scan(key, eqn, values)
        if weights and name == "cond" and eqn.params.get("branches_platforms") is None:
            return self._cond(key, eqn, values)
        if weights and name in REMATS:
            return self._remat(key, eqn, values)
        linear = linear_primitive(eqn.primitive)
        if linear is not None and len(weights) == 1 and weights[0] in linear.positions:
            return [self._meet(key, eqn, values, weights[0])]
        parts = None
        if len(weights) == 1:
            parts = moved(eqn, values[weights[0]])
        elif name == "concatenate" and len(weights) == len(values):
            parts = joined(eqn, values)
        if parts is not None:
            return [Weight(_bind(eqn, list(map(_value, values)))[0], parts)]
        self.bound(eqn)
        return _bind(eqn, self.plain(values, f"used by {name} at {self.source(eqn)}"))

    def _meet(self, key: EqnPath, eqn: Any, values: list[Any], position: int) -> Array:
        weight = values[position]
        for place, part in enumerate(weight.parts):
            at = (*key, place) if weight.joined else key
            spec, source = _spec(weight.value), self.source(eqn)
            self.meet(Meeting(at, eqn, position, spec, part, self._tap_of(key), source))
            if at in self.sites:
                linear = linear_primitive(eqn.primitive)
                assert linear is not None
                windows = self.sites[at].operand_windows
                self.kept[at] = tuple(
                    cut(values[number], window)
                    for number, window in zip(linear.saved_operands[position], windows, strict=True)
                )
        (output,) = _bind(eqn, list(map(_value, values)))
        return output

    def _tap_of(self, key: EqnPath) -> EqnPath:
        """Follows an output through the additions that alone use it."""
        *prefix, number = key
        while number in self.successors:
            number = self.successors[number]
        return (*prefix, number)

    def _inside(
        self, key: EqnPath, eqn: Any, taps: dict[EqnPath, Array], depth: int
    ) -> "Interpreter":
        here = {site: tap for site, tap in taps.items() if site[: len(key)] == key}
        return dataclasses.replace(self, taps=here, kept={}, depth=depth, caller=self.source(eqn))

    def _scan(self, key: EqnPath, eqn: Any, values: list[Any]) -> list[Any]:
        length = eqn.params["length"]
        num_consts, num_carry = _scan_counts(eqn.params)
        consts, xs = values[:num_consts], values[num_consts + num_carry :]
        if any(isinstance(x, Weight) and x.joined for x in xs):
            xs = self.plain(xs, f"joined to others and sliced by a scan at {self.source(eqn)}")
        carry = self.plain(
            values[num_consts : num_consts + num_carry], f"carried by a scan at {self.source(eqn)}"
        )

        def enter(value: Any, inner: Any, *, sliced: bool) -> Any:
            if not isinstance(value, Weight):
                return inner
            level = Scan(length, sliced)
            return Weight(inner, tuple(part.entered(level) for part in value.parts))

        def body(carry: list[Any], slices: Any) -> Any:
            slice_values, taps = slices
            program = self._inside(key, eqn, taps, self.depth + 1)
            inputs = [
                *(enter(value, _value(value), sliced=False) for value in consts),
                *carry,
                *(enter(x, value, sliced=True) for x, value in zip(xs, slice_values, strict=True)),
            ]
            outputs = program.run(eqn.params["jaxpr"], inputs, key)
            outputs = program.plain(outputs, f"returned by a scan at {self.source(eqn)}")
            # What several sites keep, a step gives out once.
            unique = {id(value): value for value in jax.tree.leaves(program.kept)}
            numbers = {identity: number for number, identity in enumerate(unique)}
            places.update(
                (site, tuple(numbers[id(value)] for value in values))
                for site, values in program.kept.items()
            )
            return outputs[:num_carry], (outputs[num_carry:], list(unique.values()))

        places: dict[EqnPath, tuple[int, ...]] = {}
        carry, (ys, kept) = jax.lax.scan(
            body,
            carry,
            (list(map(_value, xs)), self._inside(key, eqn, self.taps, 0).taps),
            length=length,
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )
        self.kept.update((site, tuple(kept[i] for i in place)) for site, place in places.items())
        return [*carry, *ys]

    def _cond(self, key: EqnPath, eqn: Any, values: list[Any]) -> list[Any]:
        # Under vmap its kernels become those of single examples.
        self.bound(eqn)
        index, *operands = values
        (index,) = self.plain([index], "it decides a cond")

        def branch(number: int, closed: Any) -> Callable[[list[Any]], Any]:
            def run(arrays: list[Any]) -> Any:
                program = self._inside(key, eqn, self.taps, self.depth)
                inputs = [
                    dataclasses.replace(value, value=array) if isinstance(value, Weight) else array
                    for value, array in zip(operands, arrays, strict=True)
                ]
                outputs = program.run(closed, inputs, (*key, number))
                outputs = program.plain(outputs, f"returned by a cond at {self.source(eqn)}")
                return outputs, self._all_of(key) | program.kept

            return run

        branches = [branch(i, closed) for i, closed in enumerate(eqn.params["branches"])]
        outputs, kept = jax.lax.switch(index, branches, list(map(_value, operands)))
        self.kept.update(kept)
        return list(outputs)

    def _all_of(self, key: EqnPath) -> dict[EqnPath, tuple[Any, ...]]:
        """Zeros in place of what the branches not taken would keep."""
        return {
            site.path: tuple(
                jnp.zeros((*(level.length for level in site.scans[self.depth :]), *spec.shape),
                          spec.dtype)
                for spec in site.operands
            )
            for site in self.sites.values()
            if site.path[: len(key)] == key
        }  # fmt: skip

    def _remat(self, key: EqnPath, eqn: Any, values: list[Any]) -> list[Any]:
        def run(arrays: list[Any], taps: dict[EqnPath, Array]) -> Any:
            program = self._inside(key, eqn, taps, self.depth)
            inputs = [
                dataclasses.replace(value, value=array) if isinstance(value, Weight) else array
                for value, array in zip(values, arrays, strict=True)
            ]
            outputs = program.run(eqn.params["jaxpr"], inputs, key)
            return program.plain(outputs, f"returned by a checkpoint at {self.source(eqn)}"), (
                program.kept
            )

        prevents = eqn.params["prevent_cse"]  # for each argument, or for all: those here are others
        prevents = any(prevents) if isinstance(prevents, tuple) else prevents
        again = jax.checkpoint(run, prevent_cse=prevents, policy=eqn.params["policy"])
        outputs, kept = again(list(map(_value, values)), self._inside(key, eqn, self.taps, 0).taps)
        self.kept.update(kept)
        return outputs


def _bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    outputs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _successors(jaxpr: Any) -> dict[int, int]:
    """Maps an equation to the addition of like shapes that is the one user of its output."""
    users: dict[Any, list[int]] = {}
    for number, eqn in enumerate(jaxpr.eqns):
        for atom in eqn.invars:
            if not isinstance(atom, jex.Literal):
                users.setdefault(atom, []).append(number)
    for atom in jaxpr.outvars:
        if not isinstance(atom, jex.Literal):
            users.setdefault(atom, []).append(-1)
    successors = {}
    for number, eqn in enumerate(jaxpr.eqns):
        using = users.get(eqn.outvars[0], []) if len(eqn.outvars) == 1 else []
        if len(using) == 1 and using[0] >= 0:
            user = jaxpr.eqns[using[0]]
            like = [_spec(eqn.outvars[0].aval)] == [_spec(output.aval) for output in user.outvars]
            if user.primitive.name == "add" and like:
                successors[number] = using[0]
    return successors


def _scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """The numbers of constants and of carried values, in the words of each JAX version."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _value(value: Any) -> Any:
    return value.value if isinstance(value, Weight) else value


def _spec(value: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def _source(eqn: Any) -> str | None:
    """The user's line: the innermost frame outside JAX, Flax and this package, if any."""
    if eqn.source_info.traceback is None:
        return None
    libraries = ("/site-packages/", "/dpoptax/per_example/")
    for frame in eqn.source_info.traceback.frames:
        if not any(part in frame.file_name for part in libraries):
            return f"{frame.file_name}:{frame.line_num}"
    return None
