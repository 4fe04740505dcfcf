"""Freshness: the next call of a step draws other noise and another batch than this one."""

from typing import Any, NamedTuple

import jax

from dpoptax.audit._certificate import Leak
from dpoptax.audit._inputs import Inputs
from dpoptax.audit._labels import Label
from dpoptax.audit._origins import Number
from dpoptax.audit._records import Event

_DRAWN = {"release": "noise", "sample": "batch"}


class State(NamedTuple):
    """The labels of a state that a step returns: a tuple with the fields `key` and `step`."""

    keys: list[Label]
    steps: list[Label]
    mechanism: list[Label]


def states_of(outputs: Any) -> list[State]:
    """Returns the states in a tree of labels."""
    found = []

    def visit(node: Any) -> bool:
        if {"key", "step"} <= set(getattr(node, "_fields", ())):
            kept = getattr(node, "mechanism_state", ())
            found.append(State(*map(jax.tree.leaves, (node.key, node.step, kept))))
        return False

    jax.tree.leaves(outputs, is_leaf=visit)
    return found


def repeated(
    events: list[Event], labels: list[Label], inputs: Inputs, states: list[State]
) -> tuple[list[Leak], list[str]]:
    """Returns releases and batches that every call repeats, and what is left to the caller."""
    leaks, assumptions = [], []
    returned = {path for label in labels for path in label.paths}
    counted = [label.number for label in labels if label.number is not None]
    for event in events:
        again = f"every call draws the same {_DRAWN[event.kind]}"
        known = [source for source in _sources(event) if source in inputs.names]
        held = [source for source in known if source in inputs.in_state]
        free = [source for source in known if source not in inputs.in_state]
        if any(_moves_on(source, returned, counted) for source in free):
            continue
        if held:
            if not _all_move_on(held, states):
                names = ", ".join(inputs.names[one] for one in held)
                reason = f"{again}: the state after it is not returned ({names})"
                leaks.append(Leak("", reason, event.where))
        elif not known:
            leaks.append(Leak("", f"{again}: its key is no argument of the step", event.where))
        elif all((one,) in returned for one in known):
            names = ", ".join(inputs.names[one] for one in known)
            reason = f"{again}: the state after it is not returned ({names})"
            leaks.append(Leak("", reason, event.where))
        else:
            names = " or ".join(inputs.names[one] for one in known)
            assumptions.append(f"The caller passes another {names} in each call.")
    return leaks, assumptions


def _all_move_on(held: list[Any], states: list[State]) -> bool:
    """Whether a state with one of these keys is returned, and each such state is a later one."""
    own = [
        state
        for state in states
        if any(path[0] in held for label in state.keys for path in label.paths)
    ]
    return bool(own) and all(_is_later(state, held) for state in own)


def _is_later(state: State, held: list[Any]) -> bool:
    paths = {path for label in state.keys for path in label.paths}
    numbers = [label.number for label in state.steps if label.number is not None]
    moved = any(_moves_on(source, paths, numbers) for source in held)
    return moved and not any(map(_is_first, state.mechanism))


def _is_first(label: Label) -> bool:
    """Whether what a mechanism keeps is still that of an argument."""
    if label.paths:
        return all(
            len(path) == 1 or (path[1][0] == "split" and len(path) == 2) for path in label.paths
        )
    return bool(label.draws) and all(path[0][1][0] == "state" for path in label.draws)


def _sources(event: Event) -> list[Any]:
    """Returns the roots of keys, and the numbers, from which the randomness of an event follows."""
    found = [path[0] for path in sorted(event.paths, key=str)]
    numbers = [one for one in event.numbers if one is not None]
    for path in event.paths:
        numbers += [part[-1] for part in path if isinstance(part[-1], Number)]
    while numbers:
        for name, _ in numbers.pop().terms:
            if len(name) == 4 and isinstance(name[3], Number):
                numbers.append(name[3])
            else:
                found.append(name)
    return list(dict.fromkeys(found))


def _moves_on(source: Any, returned: set[Any], counted: list[Number]) -> bool:
    """Whether the step returns the next value of a key or a number."""
    if source[0] == "root":
        return any(path[:1] == (source,) and len(path) > 1 for path in returned)
    return any(_counts_from(source, number) for number in counted)


def _counts_from(source: Any, number: Number) -> bool:
    if number.terms == frozenset({(source, 1)}):
        return number.offset > 0
    return len(number.terms) == 1 and any(
        name[0] == "after" and number.offset >= 0 and _starts_at(source, name[3])
        for name, _ in number.terms
    )


def _starts_at(source: Any, start: Number) -> bool:
    same = start.terms == frozenset({(source, 1)}) and start.offset >= 0
    return same or _counts_from(source, start)
