"""The loss of one example in; the places where its parameters meet data out.

The loss is traced once to a jaxpr, which is then run equation by equation. A parameter leaf, seen
through steps that only move its numbers about, meets data in an equation that is linear in it: a
*site*. At a site the input is kept and the output is tapped, so that one backward pass gives the
cotangent of every output, and the gradient of the parameter, input times cotangent, need never
be formed per example. A leaf with a use that is not understood is left to plain differentiation.

This is the one file that knows jaxprs.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jaxtyping import Array, PyTree

# Equations that give the numbers of one operand in another order or precision, or repeat them.
MOVES = {
    "slice",
    "reshape",
    "transpose",
    "broadcast_in_dim",
    "squeeze",
    "expand_dims",
    "rev",
    "convert_element_type",
    "copy",
}
# Equations that are linear in a weight, with the positions at which one may stand.
MEETINGS = {"dot_general": (0, 1), "conv_general_dilated": (1,), "gather": (0,), "add": (0, 1)}
# Of these, the ones whose derivative needs no input.
KEEPS_NOTHING = {"add"}
# Equations that only wrap a jaxpr.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
REMATS = {"remat", "remat2", "checkpoint"}

CONVOLUTION = "conv_general_dilated"

# Where an equation stands: its number in the jaxpr, and in the jaxprs around it.
Key: TypeAlias = tuple[int, ...]


class Step(NamedTuple):
    """One equation on the way from a leaf to a site; `primitive` is None where a scan slices."""

    primitive: Any
    params: dict[str, Any]


class Level(NamedTuple):
    """A scan around a site: its length, and whether it slices the weight or shares it."""

    length: int
    sliced: bool


@dataclasses.dataclass(frozen=True)
class Weight:
    """The value of a leaf inside the program, and the steps that led to it."""

    leaf: int
    value: Any
    steps: tuple[Step, ...] = ()
    levels: tuple[Level, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """An equation that is linear in one leaf.

    Attributes:
        key: where it stands.
        leaf: the number of the leaf.
        steps: from the leaf to the operand, slices by scans included.
        levels: the scans around it, outermost first.
        primitive: of the equation.
        params: of the equation.
        position: of the weight among the operands.
        weight: shape and dtype of the operand.
        operands: shapes and dtypes of the others, as far as the derivative needs them.
        output: shape and dtype of the result.
        tap: key of the equation that is tapped: the site's own, or the last of the additions that
            its output goes into and nothing else; their cotangents are one.
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
    output: jax.ShapeDtypeStruct
    tap: Key
    source: str

    @property
    def numbers(self) -> int:
        """How many numbers are kept of it per example: its operands and its cotangent."""
        scans = math.prod(level.length for level in self.levels)
        return scans * sum(math.prod(spec.shape) for spec in (*self.operands, self.output))

    def isometric(self, spec: jax.ShapeDtypeStruct) -> bool:
        """Whether the steps give every number of the leaf once, so that norms are the leaf's."""
        sliced = math.prod(level.length for level in self.levels if level.sliced)
        return math.prod(self.weight.shape) * sliced == math.prod(spec.shape)


class Trace(NamedTuple):
    """What one tracing of a loss found.

    Attributes:
        jaxpr: of `(leaves, rest) -> loss`.
        sites: in the order of the program.
        stacked: why a leaf is left to plain differentiation, by its number.
        loose_convolution: whether a convolution stands anywhere but at a site.
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
    found: dict[Key, Site] = {}
    stacked: dict[int, str] = {}
    loose: list[bool] = []

    def meet(
        program: _Program, key: Key, eqn: Any, weight: Weight, others: list[Any], position: int
    ) -> Array:
        site = Site(
            key=key,
            leaf=weight.leaf,
            steps=weight.steps,
            levels=weight.levels,
            primitive=eqn.primitive,
            params=eqn.params,
            position=position,
            weight=_spec(weight.value),
            operands=tuple(map(_spec, _needed(eqn, others))),
            output=_spec(eqn.outvars[0].aval),
            tap=program.tap_of(key),
            source=program.source(eqn),
        )
        found[key] = site
        return _meet(eqn, weight, others, position)

    def bound(eqn: Any) -> None:
        loose.append(CONVOLUTION in str(eqn))

    def run(*values: Array) -> None:
        program = _Program(meet, stacked.setdefault, bound, {}, {}, {}, 0)
        weights = [Weight(i, value) for i, value in enumerate(values[: len(leaves)])]
        outputs = program.run(closed, [*weights, *values[len(leaves) :]], ())
        program.plain(outputs, "it is the loss itself")

    jax.eval_shape(run, *jax.tree.leaves((leaves, rest)))
    sites = tuple(found[key] for key in sorted(found) if found[key].leaf not in stacked)
    used = {site.leaf for site in sites}
    for leaf in range(len(leaves)):
        if leaf not in used:
            stacked.setdefault(leaf, "the loss does not depend on it")
    return Trace(closed, sites, stacked, any(loose))


def run_with_taps(
    found: Trace, leaves: list[Any], rest: list[Any], taps: dict[Key, Array]
) -> tuple[Array, dict[Key, tuple[Any, ...]]]:
    """Runs the loss; returns it and the inputs kept at every site.

    The derivative with respect to `taps[site.tap]` is the cotangent of the output of that site.
    The values of the taps are never read.

    Args:
        found: of `trace`.
        leaves: the parameters; those with sites are constants here.
        rest: the flat example and key.
        taps: one array per tap, shaped by `tap_spec`.

    Returns:
        The scalar loss, and by site the other operands, with a leading axis per scan around it.
    """

    def meet(
        program: _Program, key: Key, eqn: Any, weight: Weight, others: list[Any], position: int
    ) -> Array:
        if key in program.sites:
            program.kept[key] = _needed(eqn, others)
        return _meet(eqn, weight, others, position)

    def refuse(leaf: int, reason: str) -> None:
        raise AssertionError(f"leaf {leaf} has a use that tracing did not see: {reason}")

    kept: dict[Key, tuple[Any, ...]] = {}
    sites = {site.key: site for site in found.sites}
    values = [leaf if i in found.stacked else Weight(i, leaf) for i, leaf in enumerate(leaves)]
    program = _Program(meet, refuse, lambda eqn: None, sites, taps, kept, 0)
    (loss,) = program.run(found.jaxpr, [*values, *rest], ())
    return loss, kept


def has_convolution(loss_fn: Callable[..., Array], params: PyTree, inputs: PyTree) -> bool:
    """Whether a convolution stands anywhere in the loss of one example."""
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), inputs)
    return CONVOLUTION in str(jax.make_jaxpr(loss_fn)(params, *one))


def evaluate(jaxpr: Any, constants: Sequence[Any], values: Sequence[Any]) -> Array:
    """Runs the jaxpr of a loss; returns the scalar."""
    (loss,) = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, list(constants)))(*values)
    return loss


def tap_spec(site: Site) -> jax.ShapeDtypeStruct:
    """The shape of a site's tap and cotangent: the scans around it, then the output."""
    lengths = tuple(level.length for level in site.levels)
    return jax.ShapeDtypeStruct((*lengths, *site.output.shape), site.output.dtype)


@jax.custom_vjp
def _tap(output: Array, tap: Array) -> Array:
    return output


_tap.defvjp(lambda output, tap: (output, None), lambda _, cotangent: (cotangent, cotangent))


@dataclasses.dataclass(frozen=True)
class _Program:
    """Runs a jaxpr whose inputs may be weights.

    Attributes:
        meet: what to do where a weight meets data.
        demote: what to do where a use is not understood, given the leaf and the reason.
        bound: told of every equation that is no site and is run as it is.
        sites: by key; empty while they are being found.
        taps: by key, for the sites in this jaxpr.
        kept: by key, filled with the operands of the sites in this jaxpr.
        depth: how many scans are around this jaxpr.
        successors: of an equation of this jaxpr, the addition that alone uses its output.
        caller: the user's line that called this jaxpr.
    """

    meet: Callable[..., Array]
    demote: Callable[[int, str], Any]
    bound: Callable[[Any], None]
    sites: dict[Key, Site]
    taps: dict[Key, Array]
    kept: dict[Key, tuple[Any, ...]]
    depth: int
    successors: dict[int, int] = dataclasses.field(default_factory=dict)
    caller: str = "a line inside a library"

    def source(self, eqn: Any) -> str:
        """The user's line of an equation."""
        return _source(eqn) or self.caller

    def tap_of(self, key: Key) -> Key:
        """Follows an output through the additions that alone use it."""
        *prefix, number = key
        while number in self.successors:
            number = self.successors[number]
        return (*prefix, number)

    def run(self, closed: Any, values: Sequence[Any], prefix: Key) -> list[Any]:
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
                outputs = [_tap(outputs[0], self.taps[key])]
            environment.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def plain(self, values: Sequence[Any], reason: str) -> list[Any]:
        """Turns weights into values, and gives up on their leaves."""
        for value in values:
            if isinstance(value, Weight):
                self.demote(value.leaf, reason)
        return [value.value if isinstance(value, Weight) else value for value in values]

    def _equation(self, key: Key, eqn: Any, values: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        weights = [i for i, value in enumerate(values) if isinstance(value, Weight)]
        if weights and name in CALLS:
            inside = dataclasses.replace(self, caller=self.source(eqn))
            return inside.run(eqn.params[CALLS[name]], values, key)
        if weights and name == "scan":
            return self._scan(key, eqn, values)
        if weights and name == "cond":
            return self._cond(key, eqn, values)
        if weights and name in REMATS:
            return self._remat(key, eqn, values)
        if len(weights) == 1:
            (position,) = weights
            others = [value for i, value in enumerate(values) if i != position]
            if position in MEETINGS.get(name, ()):
                return [self.meet(self, key, eqn, values[position], others, position)]
            if _moves(eqn):
                weight = values[position]
                step = Step(eqn.primitive, eqn.params)
                (moved,) = _bind(eqn, [weight.value])
                return [dataclasses.replace(weight, value=moved, steps=(*weight.steps, step))]
        self.bound(eqn)
        return _bind(eqn, self.plain(values, f"used by {name} at {self.source(eqn)}"))

    def _inside(self, key: Key, eqn: Any, taps: dict[Key, Array], depth: int) -> "_Program":
        here = {site: tap for site, tap in taps.items() if site[: len(key)] == key}
        return dataclasses.replace(self, taps=here, kept={}, depth=depth, caller=self.source(eqn))

    def _scan(self, key: Key, eqn: Any, values: list[Any]) -> list[Any]:
        length = eqn.params["length"]
        num_consts, num_carry = _scan_counts(eqn.params)
        consts, xs = values[:num_consts], values[num_consts + num_carry :]
        carry = self.plain(
            values[num_consts : num_consts + num_carry], f"carried by a scan at {self.source(eqn)}"
        )

        def enter(value: Any, inner: Any, *, sliced: bool) -> Any:
            if not isinstance(value, Weight):
                return inner
            steps = (*value.steps, Step(None, {})) if sliced else value.steps
            levels = (*value.levels, Level(length, sliced))
            return Weight(value.leaf, inner, steps, levels)

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

        places: dict[Key, tuple[int, ...]] = {}
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

    def _cond(self, key: Key, eqn: Any, values: list[Any]) -> list[Any]:
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

    def _all_of(self, key: Key) -> dict[Key, tuple[Any, ...]]:
        """Zeros in place of what the branches not taken would keep."""
        return {
            site.key: tuple(
                jnp.zeros((*(level.length for level in site.levels[self.depth :]), *spec.shape),
                          spec.dtype)
                for spec in site.operands
            )
            for site in self.sites.values()
            if site.key[: len(key)] == key
        }  # fmt: skip

    def _remat(self, key: Key, eqn: Any, values: list[Any]) -> list[Any]:
        def run(arrays: list[Any], taps: dict[Key, Array]) -> Any:
            program = self._inside(key, eqn, taps, self.depth)
            inputs = [
                dataclasses.replace(value, value=array) if isinstance(value, Weight) else array
                for value, array in zip(values, arrays, strict=True)
            ]
            outputs = program.run(eqn.params["jaxpr"], inputs, key)
            return program.plain(outputs, f"returned by a checkpoint at {self.source(eqn)}"), (
                program.kept
            )

        again = jax.checkpoint(
            run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
        )
        outputs, kept = again(list(map(_value, values)), self._inside(key, eqn, self.taps, 0).taps)
        self.kept.update(kept)
        return outputs


def _bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    outputs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _meet(eqn: Any, weight: Weight, others: list[Any], position: int) -> Array:
    (output,) = _bind(eqn, [*others[:position], weight.value, *others[position:]])
    return output


def _needed(eqn: Any, others: list[Any]) -> tuple[Any, ...]:
    return () if eqn.primitive.name in KEEPS_NOTHING else tuple(others)


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
            like = _spec(eqn.outvars[0].aval) == _spec(user.outvars[0].aval)
            if user.primitive.name == "add" and like:
                successors[number] = using[0]
    return successors


def _moves(eqn: Any) -> bool:
    """Whether an equation gives the same numbers back, moved or in another float type."""
    (output, *_) = eqn.outvars
    return eqn.primitive.name in MOVES and bool(jnp.issubdtype(output.aval.dtype, jnp.floating))


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
