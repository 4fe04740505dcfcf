"""Rules for the markers: a batch is drawn and gathered, gradients are taken, a sum is released."""

import math
from typing import Any

import attrs

from dpoptax import _jax_compat, _markers, _validate, samplers
from dpoptax._package_classes import is_of_package
from dpoptax.audit._data_flow import Flow, MarkerRule
from dpoptax.audit._labels import (
    DATA,
    MIXED,
    Label,
    Ordered,
    Reason,
    Rows,
    common_rows,
    dependent,
    first_reason,
)
from dpoptax.audit._loops import slice_of
from dpoptax.audit._origins import UNKNOWN, Number, is_made
from dpoptax.audit._records import Event
from dpoptax.audit._values import is_zero
from dpoptax.clipping import StatefulClipRule
from dpoptax.clipping._unit import first_rule
from dpoptax.mechanisms import StatefulMechanism
from dpoptax.schedules import as_schedule
from dpoptax.transforms._release import SumRelease

# Samplers that draw each batch by itself. The others count on the batches before.
INDEPENDENT = (
    samplers.Poisson,
    samplers.FixedSize,
    samplers.UserPoisson,
    samplers.UserExamplesPoisson,
)
_MADE = "is made of numbers of the program, so whoever reads the program knows it"


def marker_rules(num_examples: int) -> dict[Any, MarkerRule]:
    """Returns the rules by primitive, for private data of that many examples."""

    def take(flow: Flow, eqn: Any, labels: list[Label]) -> list[Label]:
        return _take(flow, eqn, labels, num_examples)

    return {
        _markers.SAMPLE: _sample,
        _markers.TAKE: take,
        _markers.PER_EXAMPLE: _per_example,
        _markers.RELEASE: _release,
        _markers.BIND_KEY: _bind_key,
    }


def _private(flow: Flow, labels: list[Label], what: str, eqn: Any) -> Label:
    """Returns the label of an output about which nothing good is known."""
    reason = first_reason(labels) or Reason(what, flow.line(eqn))
    return Label(data=MIXED, reason=reason)


def _sample(flow: Flow, eqn: Any, labels: list[Label]) -> list[Label]:
    note = eqn.params["note"]
    traced = iter(labels)
    # Tables of a sampler may have one entry per example. They are private only if they are data.
    with flow.trusting_tables():
        constants = [
            next(traced) if one is None else flow.of_constant(one) for one in note.constants
        ]
        before = list(traced)
        *after, indices, mask = flow.within(eqn, note.jaxpr, [*constants, *before])
    drawn = dependent([indices, mask], None, None)
    flow.records.draw(drawn.draws)
    if any(not label.is_clean for label in (*constants, *before, *after, indices, mask)):
        labels = [*labels, *constants, *after, indices, mask]
        bad = _private(flow, labels, "the batch is chosen by private data", eqn)
        return [bad] * len(eqn.outvars)
    batch = flow.inside(eqn)
    flow.samplers[batch] = note.sampler
    if mask.uniform is True:
        flow.full_batches.add(batch)
    keys = frozenset(path for label in before for path in label.paths)
    numbers = tuple(label.number for label in before)
    if drawn.draws:
        flow.sampling |= drawn.draws
        where = flow.line(eqn)
        flow.records.add(Event("sample", keys, numbers, where, batch=batch, detail=note.sampler))
    if not note.own_state:
        what = "the state of the sampler is not of the types that its `init` makes"
        flow.records.refuse(Reason(what, flow.line(eqn)))
    if is_made(keys | drawn.draws):
        flow.records.refuse(Reason(f"the key of the batch {_MADE}", flow.line(eqn)))
    # Its rows are private, and say the same as the random numbers.
    rows = attrs.evolve(drawn, data=Rows(0, batch), draws=frozenset())
    state = before[0].state if before else None
    changed = state is None or any(label.state != state for label in before)
    if changed and type(note.sampler) not in INDEPENDENT:
        what = "the state of the sampler is not that of an argument, or was changed"
        flow.records.refuse(Reason(what, flow.line(eqn)))
    return [
        *(attrs.evolve(label, declared=bool(label.draws), state=state) for label in after),
        attrs.evolve(rows, mark="indices"),
        attrs.evolve(rows, mark="mask"),
    ]


def _take(flow: Flow, eqn: Any, labels: list[Label], num_examples: int) -> list[Label]:
    indices, mask, *columns = labels
    if indices.mark != "indices" or indices.rows is None:
        what = "rows are gathered by indices that no sampler drew, or that were changed"
        return [_private(flow, labels, what, eqn)] * len(eqn.outvars)
    batch = indices.rows.batch
    outputs = []
    for atom, label in zip(eqn.invars[2:], columns, strict=True):
        of_data = label.data == Rows(0, DATA) or label.is_clean
        if of_data and atom.aval.shape[0] == flow.samplers[batch].num_examples == num_examples:
            # A column may also hold random numbers, or keys, which may repeat in a batch.
            found = dependent([indices, mask, label], Rows(0, batch), None)
            paths = frozenset((*path, UNKNOWN) for path in label.paths)
            outputs.append(attrs.evolve(found, paths=paths, zero_padding=True))
            continue
        what = "rows are gathered from an array that has not one row per example"
        outputs.append(_private(flow, [label], what, eqn))
    rows = dependent([indices, mask], Rows(0, batch), None)
    if mask.is_clean or mask.data == rows.data:
        return [*outputs, attrs.evolve(rows, mark="mask")]
    return [*outputs, _private(flow, [mask], "the mask is of another batch", eqn)]


def _per_example(flow: Flow, eqn: Any, labels: list[Label]) -> list[Label]:
    note = eqn.params["note"]
    _mask, rest = labels[0], labels[1:]
    rows, weights = rest[: note.rows], rest[note.rows :][: note.weights]
    captured = [
        *rest[note.rows + note.weights :],
        *map(flow.of_constant, _jax_compat.constants_inside(note.jaxpr)),
    ]
    flow.records.draw(path for label in (*labels, *captured) for path in label.paths)
    for one in _jax_compat.equations(note.jaxpr):
        if not flow.is_known(one):
            flow.refuse(
                one,
                f"the loss has the equation `{one.primitive.name}`, about which nothing is known",
            )
            return [_private(flow, [], "the loss has an unknown equation", eqn)] * len(eqn.outvars)
    problems = {
        "the gradients are taken at parameters that depend on private data": weights,
        "the loss captured private data, so all gradients depend on them": captured,
    }
    for what, found in problems.items():
        if any(not label.is_clean for label in found):
            return [_private(flow, found, what, eqn)] * len(eqn.outvars)
    batch = common_rows(rows)
    if batch is None and all(label.is_clean for label in rows):
        return [dependent(labels, None, None)] * len(eqn.outvars)
    if batch is None or batch.axis != 0:
        what = "an example of the batch is not the row of one example of the data"
        return [_private(flow, rows, what, eqn)] * len(eqn.outvars)
    # The loss may draw from its own keys, or from captured ones.
    own = rest[note.rows + note.weights :]
    one_row = [slice_of(label, flow.inside(eqn)) for label in rows]
    found = flow.within(eqn, note.jaxpr, [*own, *weights, *one_row])
    return [dependent([*rows, *weights, *captured, *found], batch, None)] * len(eqn.outvars)


def _release(flow: Flow, eqn: Any, labels: list[Label]) -> list[Label]:
    note = eqn.params["note"]
    count = len(labels) - note.masks
    (key, step, *rest), masks = labels[:count], labels[count:]
    grads, state = rest[: note.leaves], rest[note.leaves :]
    rows = common_rows(grads)
    problem = _problem_of_settings(note.settings) or _problem_of_rows(flow, grads, rows)
    blamed = grads
    ordered = in_order([step, *state])
    if not all(is_of_package(form, "dpoptax") for form in note.forms):
        problem = "the gradients are of a class of your own, whose clip is not known"
    elif note.release is not SumRelease:
        problem = "the release is of a class of your own, whose noise is not known"
    elif isinstance(note.settings[0], StatefulClipRule) and not _count(flow, masks, rows):
        problem = "padded rows vote, because the mask of the batch was dropped"
    elif needs_order(note.settings) and not ordered:
        problem = "what a release counts or keeps is not as the release before left it"
    elif any(not label.is_clean for label in (key, step)):
        problem, blamed = "the key of the noise depends on private data", [key, step]
    elif not key.paths:
        problem = "the origin of the noise key is unknown"
    elif is_made(key.paths):
        problem = f"the key of the noise {_MADE}"
    elif any(label.draws & flow.kept for label in grads):
        problem = "the gradients depend on noise that the mechanism keeps"
    elif any(UNKNOWN in path for label in state[note.public :] for path in label.paths):
        problem = "the state of the mechanism is not that after the release before"
    elif any(not label.is_clean for label in state):
        problem, blamed = "the state of the clip rule depends on private data", state
    if problem is not None:
        return [_private(flow, blamed, problem, eqn)] * len(eqn.outvars)
    batch, where = None if rows is None else rows.batch, flow.line(eqn)
    flow.records.add(Event("release", key.paths, (), where, batch=batch, detail=note.settings))
    if needs_order(note.settings):
        # Each number of a state is used once: another key is not enough.
        run = frozenset({(("root", ("count", step.state.number)),)})
        flow.records.add(Event("count", run, (step.number,), where))
    seen = (key, step, *grads, *state)
    flow.released_draws |= frozenset().union(*(label.draws for label in seen))
    version = flow.inside(eqn)
    number = None if step.number is None else step.number.plus(Number(offset=1)).in_32_bits()
    outputs = [
        *[Label(released=True)] * note.leaves,
        attrs.evolve(step, number=number, uniform=None, state=_left(step, ordered, version)),
    ]
    held = zip(eqn.outvars[note.leaves + 1 :], state, strict=True)
    for position, (atom, label) in enumerate(held):
        left = _left(label, ordered, version)
        if position < note.public:
            outputs.append(Label(released=True, state=left))
            continue
        # A mechanism may keep keys: they move on with the release. All else that it keeps tells
        # the noise.
        last = ("released", flow.inside(eqn))
        paths = frozenset((*path, last) for path in label.paths or key.paths)
        if _validate.is_key(atom.aval):
            outputs.append(Label(released=True, paths=paths, state=left))
        else:
            flow.kept |= paths
            outputs.append(Label(draws=paths, declared=True, state=left))
    return outputs


def _count(flow: Flow, masks: list[Label], rows: Rows | None) -> bool:
    """Whether the masks let real rows vote only, where a clip rule counts votes."""
    if rows is None or rows.batch == DATA or rows.batch in flow.full_batches:
        return rows is not None
    return all(one.mark == "mask" and one.data == rows for one in masks)


def needs_order(settings: tuple[Any, ...]) -> bool:
    """Whether a release depends on its number, or on what the releases before left."""
    noise, kept = as_schedule(settings[2]), (StatefulClipRule, StatefulMechanism)
    return noise.min != noise.max or any(isinstance(one, kept) for one in settings)


def in_order(labels: list[Label]) -> bool:
    """Whether the number of a release and what its mechanism keeps are those of one release."""
    first = labels[0].state
    return isinstance(first, Ordered) and all(
        label.state == attrs.evolve(first, position=position)
        for position, label in enumerate(labels)
    )


def _left(label: Label, ordered: bool, version: Any) -> Any:
    return attrs.evolve(label.state, version=version) if ordered else None


def _problem_of_settings(settings: tuple[Any, ...]) -> str | None:
    rule, _, noise = settings[:3]
    if as_schedule(noise).min <= 0:
        return "the noise multiplier is zero, so nothing is private"
    # The bound of a rule with state is public, finite and follows from its own releases.
    bound = first_rule(rule).l2_clip if isinstance(rule, StatefulClipRule) else rule.l2_clip
    if not math.isfinite(as_schedule(bound).max):
        return "the clip bound is infinite, so nothing is private"
    return None


def _problem_of_rows(flow: Flow, grads: list[Label], rows: Rows | None) -> str | None:
    if all(label.is_clean for label in grads):
        return None
    if rows is None or rows.axis != 0:
        return "the gradients are not those of one example per row, so the clip bounds nothing"
    if rows.batch == DATA or rows.batch in flow.full_batches:
        return None
    if rows.batch not in flow.samplers:
        return "the gradients are of one example only, or of a part of a batch"
    # A public number in a padded row takes a share of its clip bound.
    padded = all(label.zero_padding or is_zero(label) for label in grads)
    return None if padded else "padded rows count, because the mask of the batch was dropped"


def _bind_key(flow: Flow, eqn: Any, labels: list[Label]) -> list[Label]:
    # The new key is a secret hash. What it depends on is not seen in the noise.
    key = labels[0]
    part = ("bound", flow.inside(eqn))
    return [attrs.evolve(key, paths=frozenset((*path, part) for path in key.paths))]
