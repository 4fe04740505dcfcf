"""Labels of what a loop carries: before, inside and after it."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import attrs

from dpoptax.audit._labels import MIXED, Label, Ordered, Reason, Rows, is_inside
from dpoptax.audit._origins import (
    BOUND_IN_LOOP,
    LARGEST_STRIDE,
    UNKNOWN,
    Number,
    Path,
    is_bound,
)

# From the labels of the carry to those of all outputs of the body.
LoopPass: TypeAlias = Callable[[list[Label]], list[Label]]


def carried_labels(
    labels: Sequence[Label], name: Any, unknown: frozenset[int], initial: Sequence[Label] = ()
) -> list[Label]:
    """Returns the labels of a carry inside a loop.

    Args:
        labels: what is known about the values.
        name: of the loop.
        unknown: slots in which keys and numbers do not follow from those of the iteration before.
        initial: the labels before the loop; by default `labels`.
    """
    found = []
    for slot, (label, first) in enumerate(zip(labels, initial or labels, strict=True)):
        number, paths = None, frozenset[Path]()
        if slot in unknown:
            paths = frozenset((*_outside(path, name), UNKNOWN) for path in label.paths)
        else:
            paths = frozenset((*path, ("carried", name, slot)) for path in first.paths)
            if first.number is not None:
                number = Number.of(("carried", name, slot, first.number))
        label = _mixed_by_iterations(label, name)
        found.append(
            attrs.evolve(label, paths=paths, number=number, uniform=None, words=None, mark=None)
        )
    return found


def with_states(
    labels: Sequence[Label], initial: Sequence[Label], results: Sequence[Label] | None, name: Any
) -> list[Label]:
    """Gives the states of `privatize` to the labels of a carry.

    What moves on together does so in all iterations, if the body leaves it together.

    Args:
        labels: of the carry inside the loop.
        initial: the labels before the loop.
        results: what the body makes of the carry; None before the first pass.
        name: of the loop.
    """
    after: dict[Any, set[Any]] = {}
    for first, result in zip(initial, results or (), strict=False):
        if isinstance(first.state, Ordered):
            versions = after.setdefault((first.state.number, first.state.version), set())
            versions.add(_version_after(first.state, result.state))
    found = []
    for label, first in zip(labels, initial, strict=True):
        state = first.state
        if isinstance(state, Ordered):
            versions = after.get((state.number, state.version), {name})
            together = len(versions) == 1 and None not in versions
            carried = attrs.evolve(state, version=("carried", name, state.version))
            label = attrs.evolve(label, state=carried if together else None)
        found.append(label)
    return found


def _version_after(before: Ordered, after: Any) -> Any:
    """Returns which release left what was carried; None if it is something else."""
    same = isinstance(after, Ordered) and after == attrs.evolve(before, version=after.version)
    return after.version if same else None


def next_of_carry(
    now: Sequence[Label], results: Sequence[Label]
) -> tuple[dict[Any, Any], frozenset[int]]:
    """Returns what follows the variables of a loop, and the slots where that is not known."""
    following: dict[Any, Any] = {}
    unclear = set()
    for slot, (label, result) in enumerate(zip(now, results, strict=False)):
        for path in label.paths:
            after = [one for one in result.paths if one[: len(path)] == path]
            clear = len(after) == 1 and len(result.paths) == len(label.paths)
            following[path] = after[0] if clear else None
            if not clear:
                unclear.add(slot)
        if label.number is None:
            continue
        ((variable, _),) = label.number.terms
        following[variable] = result.number if _counts_up(label.number, result.number) else None
        if following[variable] is None:
            unclear.add(slot)
    return following, frozenset(unclear)


def labels_after(
    initial: Sequence[Label], now: Sequence[Label], results: Sequence[Label], name: Any
) -> list[Label]:
    """Returns the labels of all outputs of a loop; see `carried_labels`."""
    found = []
    for slot, (first, label, result) in enumerate(zip(initial, now, results, strict=False)):
        paths, number = label.paths, None
        if not any(UNKNOWN in path for path in paths):
            evolves = result.paths != label.paths
            last = (("after", name, slot),) if evolves else ()
            if any(is_bound(path[len(start) :]) for path in result.paths for start in paths):
                last = (*last, BOUND_IN_LOOP)
            paths = frozenset((*path, *last) for path in first.paths)
        if label.number is not None and first.number is not None:
            evolves = result.number != label.number
            number = Number.of(("after", name, slot, first.number)) if evolves else first.number
        found.append(attrs.evolve(label, paths=paths, number=number))
    return [*found, *results[len(now) :]]


def _reshaped(label: Label, **changes: Any) -> Label:
    """Returns a label with changes, without what is known of the whole array only."""
    return attrs.evolve(
        label, number=None, words=None, mark=None, zero_padding=False, state=None, **changes
    )


def slice_of(label: Label, name: Any) -> Label:
    """Returns the label of what one iteration of a scan gets of an array."""
    data = label.data
    if isinstance(data, Rows):
        if data.axis == 0:
            data = Rows(None, ("each", name, data.batch))
        elif data.axis is not None:
            data = Rows(data.axis - 1, data.batch)
    paths = frozenset(_element(path, name) for path in label.paths)
    return _reshaped(label, data=data, paths=paths)


def stacked(label: Label, name: Any) -> Label:
    """Returns the label of the outputs of all iterations of a scan, from that of one."""
    data, reason = label.data, label.reason
    if isinstance(data, Rows):
        if data.axis is None and data.batch[:2] == ("each", name):
            data = Rows(0, data.batch[2])
        elif data.axis is not None and not is_inside(data.batch, name):
            data = Rows(data.axis + 1, data.batch)
        else:
            data, reason = MIXED, reason or Reason("a scan returns rows of several batches", "")
    paths = frozenset((*path, UNKNOWN) for path in label.paths)
    return _reshaped(label, data=data, paths=paths, reason=reason)


def _mixed_by_iterations(label: Label, name: Any) -> Label:
    """Rows that were drawn in one iteration are of other examples than those of the next one."""
    if label.rows is None or not is_inside(label.rows.batch, name):
        return label
    reason = Reason("a loop carries rows of one batch into the next iteration", "")
    return attrs.evolve(label, data=MIXED, zero_padding=False, reason=label.reason or reason)


def _outside(path: Path, name: Any) -> Path:
    """Returns the part of a path before a loop, so that paths stay finite."""
    for place, part in enumerate(path):
        if part == UNKNOWN or part[:2] == ("carried", name):
            # A key stays bound to the data, whatever becomes of it.
            before = path[:place]
            return (*before, BOUND_IN_LOOP) if is_bound(path) and not is_bound(before) else before
    return path


def _element(path: Path, name: Any) -> Path:
    if path and path[-1][0] == "split" and path[-1][2] is None and len(path[-1][1]) == 1:
        return (*path[:-1], ("split", path[-1][1], ("each", name, 0)))
    return (*path, UNKNOWN)


def _counts_up(number: Number, result: Number | None) -> bool:
    """Whether a counter stays, grows by a constant, or goes through an inner loop."""
    if result is None:
        return False
    apart = result.plus(number, -1)
    if not apart.terms:
        return 0 <= apart.offset <= LARGEST_STRIDE
    for name, count in result.terms:
        if (
            name[0] == "after"
            and count == 1
            and len(result.terms) == 1
            and 0 <= result.offset <= LARGEST_STRIDE
        ):
            return _counts_up(number, name[3])
    return False
