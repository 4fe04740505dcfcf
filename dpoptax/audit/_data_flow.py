"""Data flow: follows labels through a jaxpr, from the inputs of a step to all that it returns."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import jax
import numpy as np

from dpoptax import _jax_compat
from dpoptax.audit import _key_rules, _row_rules, _source, _values
from dpoptax.audit._labels import MIXED, Label, Reason, Rows, common_rows, dependent, join
from dpoptax.audit._loops import (
    LoopPass,
    carried_labels,
    labels_after,
    next_of_carry,
    slice_of,
    stacked,
    with_states,
)
from dpoptax.audit._origins import Path, always_differ, differ
from dpoptax.audit._records import Records

# A label for an array that the program captured, by whether tables of an entry per example are
# private.
OfConstant = Callable[[Any, bool], Label]
# Rules for the markers of the pipeline, by primitive.
MarkerRule = Callable[["Flow", Any, list[Label]], list[Label]]
_PASSES_ON = {"optimization_barrier", "copy", "device_put", "name", "reshard", "stop_gradient"}


class Flow:
    """Follows labels through jaxprs.

    Attributes:
        records: what was drawn and released, and what is wrong whatever is returned.
        samplers: the sampler of each batch.
        full_batches: batches without padding.
        sampling: the keys that batches were drawn from.
        released_draws: the keys whose random bits are in what was released.
        kept: what tells the noise of a mechanism with a state.
        place: the equations around the current one, which tell apart two calls of one function.
    """

    def __init__(self, of_constant: OfConstant, markers: dict[Any, MarkerRule]) -> None:
        self._of_constant = of_constant
        self._tables_are_private = True
        self.records = Records()
        self.samplers: dict[Any, Any] = {}
        self.full_batches: set[Any] = set()
        self.sampling: frozenset[Path] = frozenset()
        self.kept: frozenset[Path] = frozenset()
        self.released_draws: frozenset[Path] = frozenset()
        self.place: tuple[int, ...] = ()
        self._lines: list[str] = [""]
        self._deciding: list[Label] = []
        self._markers = markers

    def chooses_batches(self, draws: frozenset[Path]) -> bool:
        """Whether random bits may be those of a sampler, in this call or in another one."""
        return any(
            not differ(one, key, as_ancestors=False, numbers=always_differ)
            for one in draws
            for key in self.sampling
        )

    def of_constant(self, value: Any) -> Label:
        """Returns the label of an array that the program captured."""
        return self._of_constant(value, self._tables_are_private)

    @contextlib.contextmanager
    def trusting_tables(self) -> Iterator[None]:
        """Inside, an array with an entry per example is private only if it is a private column."""
        self._tables_are_private = False
        yield
        self._tables_are_private = True

    def run(self, jaxpr: Any, inputs: Sequence[Label]) -> list[Label]:
        """Returns the labels of the outputs, from those of the inputs after the constants."""
        variables, constants = _jax_compat.inputs_of(jaxpr)
        environment = dict(
            zip(variables, [*map(self.of_constant, constants), *inputs], strict=True)
        )

        def read(atom: Any) -> Label:
            return self._literal(atom) if _jax_compat.is_literal(atom) else environment[atom]

        for eqn in jaxpr.eqns:
            results = self._equation(eqn, [read(atom) for atom in eqn.invars])
            environment.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def inside(self, eqn: Any, *parts: Any) -> tuple[Any, ...]:
        """Returns a name for an equation at this place."""
        return (*self.place, id(eqn), *parts)

    def line(self, eqn: Any) -> str:
        """Returns the line of an equation, or of the call that it is in."""
        return _source.line_of(eqn) or self._lines[-1]

    def refuse(self, eqn: Any, what: str) -> list[Label]:
        """Records that nothing is known about an equation."""
        reason = Reason(what, self.line(eqn))
        self.records.refuse(reason)
        return [Label(data=MIXED, reason=reason)] * len(eqn.outvars)

    def _literal(self, atom: Any) -> Label:
        if np.ndim(atom.val):
            return self.of_constant(atom.val)
        return _values.of_number(atom.val)

    def _equation(self, eqn: Any, labels: list[Label]) -> list[Label]:
        rule = self._markers.get(eqn.primitive)
        if rule is not None and not _source.is_marked_by_package(eqn):
            return self.refuse(eqn, "a marker is not made by the function that it stands for")
        if rule is not None:
            return rule(self, eqn, labels)
        if (called := _called(eqn)) is not None:
            return self.within(eqn, called, labels)
        if eqn.primitive is jax.lax.cond_p:
            return self._cond(eqn, labels)
        if eqn.primitive is jax.lax.scan_p:
            return self._scan(eqn, labels)
        if eqn.primitive is jax.lax.while_p:
            return self._while(eqn, labels)
        # The callback of `jax.debug.callback` may run any code.
        if eqn.primitive is _jax_compat.print_primitive():
            return self._print(eqn, labels)
        if not (_jax_compat.is_pure(eqn) and self.is_known_inside(eqn)):
            return self.refuse(
                eqn,
                f"the equation `{eqn.primitive.name}` is unknown: a callback, a custom call, or a "
                "primitive without a rule here",
            )
        if eqn.primitive.name in _PASSES_ON and len(labels) == len(eqn.outvars):
            return labels
        if (keys := _key_rules.outputs(self, eqn, labels)) is not None:
            return keys
        return self._plain(eqn, labels)

    def is_known_inside(self, eqn: Any) -> bool:
        """Whether all equations that an equation holds are pure, such as the sum of a scatter."""
        holds_arrays = any(
            getattr(jaxpr, "consts", ()) or [*_jax_compat.constants_inside(jaxpr)]
            for jaxpr in _jax_compat.inner_jaxprs(eqn)
        )
        return not holds_arrays and all(map(self.is_known, _jax_compat.equations_inside(eqn)))

    def is_known(self, eqn: Any) -> bool:
        """Whether an equation computes its outputs from its inputs and does nothing else."""
        control = (jax.lax.cond_p, jax.lax.scan_p, jax.lax.while_p)
        runs_others = any(eqn.primitive is one for one in control) or _called(eqn) is not None
        return not eqn.effects and (runs_others or _jax_compat.is_pure(eqn))

    def within(self, eqn: Any, jaxpr: Any, labels: list[Label]) -> list[Label]:
        """Returns the labels of the outputs of a jaxpr that an equation runs."""
        outside, self.place = self.place, self.inside(eqn)
        self._lines.append(self.line(eqn))
        try:
            return self.run(jaxpr, labels)
        finally:
            self.place = outside
            self._lines.pop()

    def _print(self, eqn: Any, labels: list[Label]) -> list[Label]:
        # Whether something is printed tells what decided it.
        for label in (*labels, *self._deciding):
            if not label.is_clean or label.draws or label.paths:
                reason = Reason("a private or secret value is printed", self.line(eqn))
                self.records.refuse(label.reason or reason)
        return []

    def _plain(self, eqn: Any, labels: list[Label]) -> list[Label]:
        """A pure computation: nothing private, rows of one batch, or a mixture."""
        name = eqn.primitive.name
        self.records.draw(path for label in labels for path in label.paths)
        if all(label.is_clean for label in labels):
            public = dependent(labels, None, None)
            number, uniform = _values.number_of(eqn, labels), _values.uniform_of(eqn, labels)
            return [attrs.evolve(public, number=number, uniform=uniform)] * len(eqn.outvars)
        rows = common_rows(labels)
        if rows is not None and rows.axis is None:
            return [dependent(labels, rows, None)] * len(eqn.outvars)
        found = None
        batches = {label.rows.batch for label in labels if label.rows}
        whole = any(label.rows and label.rows.axis is None for label in labels)
        if all(label.data is None or label.rows for label in labels) and not whole:
            axes = [label.rows.axis if label.rows else None for label in labels]
            found = _row_rules.axes_of_outputs(eqn, axes) if len(batches) == 1 else None
        if found is None:
            reason = Reason(f"`{name}` combines private values of several examples", self.line(eqn))
            return [dependent(labels, MIXED, reason)] * len(eqn.outvars)
        (batch,) = batches
        label = attrs.evolve(
            dependent(labels, None, None),
            mark=_values.mark_of(eqn, labels),
            zero_padding=_values.has_zero_padding(eqn, labels),
        )
        return [attrs.evolve(label, data=Rows(axis, batch)) for axis in found]

    def _cond(self, eqn: Any, labels: list[Label]) -> list[Label]:
        chosen, *operands = labels
        results: list[Label] | None = None
        for number, branch in enumerate(eqn.params["branches"]):
            with self.records.branch(self.inside(eqn), number), self._deciding_by(chosen):
                found = self.within(eqn, branch, operands)
            results = found if results is None else list(map(join, results, found))
        return [self._decided(eqn, chosen, label) for label in results or []]

    @contextlib.contextmanager
    def _deciding_by(self, label: Label) -> Iterator[None]:
        self._deciding.append(label)
        yield
        self._deciding.pop()

    def _decided(self, eqn: Any, chosen: Label, label: Label) -> Label:
        """A value that also depends on which branch ran, or on how often a loop ran."""
        self.records.draw(chosen.paths)
        if chosen.is_clean and not chosen.draws:
            return label
        reason = Reason(f"`{eqn.primitive.name}` decides by a private value", self.line(eqn))
        data = label.data if chosen.is_clean else MIXED
        both = dependent([chosen, attrs.evolve(label, paths=frozenset())], data, reason)
        return attrs.evolve(both, paths=label.paths)

    def _scan(self, eqn: Any, labels: list[Label]) -> list[Label]:
        consts, carried = _jax_compat.scan_counts(eqn)
        constants, carry, xs = (
            labels[:consts],
            labels[consts:][:carried],
            labels[consts + carried :],
        )
        name = self.inside(eqn)
        slices = [slice_of(label, name) for label in xs]
        outputs = self._loop(
            eqn,
            carry,
            lambda now: self.within(eqn, eqn.params["jaxpr"], [*constants, *now, *slices]),
        )
        return [*outputs[:carried], *(stacked(label, name) for label in outputs[carried:])]

    def _while(self, eqn: Any, labels: list[Label]) -> list[Label]:
        num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond, body, carry = (
            labels[:num_cond],
            labels[num_cond:][:num_body],
            labels[num_cond + num_body :],
        )

        def one_pass(now: list[Label]) -> list[Label]:
            (ends,) = self.within(eqn, eqn.params["cond_jaxpr"], [*cond, *now])
            with self._deciding_by(ends):
                found = self.within(eqn, eqn.params["body_jaxpr"], [*body, *now])
            return [self._decided(eqn, ends, label) for label in found]

        # Also a loop that ends at once says that its condition was false.
        results = self._loop(eqn, carry, one_pass)
        (ends,) = self.within(eqn, eqn.params["cond_jaxpr"], [*cond, *results])
        return [self._decided(eqn, ends, label) for label in results]

    def _loop(self, eqn: Any, carry: list[Label], one_pass: LoopPass) -> list[Label]:
        """Runs the body until the labels of the carry no longer change."""
        name, start = self.inside(eqn), self.records.position()
        now, unknown = carried_labels(carry, name, frozenset()), frozenset[int]()
        now = with_states(now, carry, None, name)
        while True:
            self.records.rewind(start)
            results = one_pass(now)
            following, unclear = next_of_carry(now, results)
            grown = carried_labels(list(map(join, now, results)), name, unknown | unclear, carry)
            grown = with_states(grown, carry, results, name)
            if grown == now and unclear <= unknown:
                break
            now, unknown = grown, unknown | unclear
        self.records.end_loop(start, {**following, "loop": name})
        return labels_after(carry, now, results, name)


def _called(eqn: Any) -> Any | None:
    """Returns the jaxpr of an equation that only runs it."""
    if (called := _jax_compat.called_jaxpr(eqn)) is not None:
        return called
    if (checkpoint := _jax_compat.checkpoint_params(eqn)) is not None:
        return checkpoint["jaxpr"]
    return _jax_compat.custom_derivative_jaxpr(eqn)
