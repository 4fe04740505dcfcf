"""Freshness: the next call of a step draws other noise and another batch than this one."""

import re
from typing import Any, NamedTuple

import jax

from dpoptax.audit._certificate import Leak
from dpoptax.audit._inputs import Inputs
from dpoptax.audit._labels import Label
from dpoptax.audit._marker_rules import INDEPENDENT, in_order
from dpoptax.audit._origins import Number, always_differ
from dpoptax.audit._records import Event, Records, are_distinct, next_event

# A reuse shows after one call, or after two if two draws take turns.
_CALLS = 2
_ARGUMENT = re.compile(r"^(args\[\d+\])(.*)$", re.DOTALL)
_AGAIN = {
    "release": "every call draws the same noise",
    "sample": "every call draws the same batch",
    "count": "the numbers of releases are not those of one run",
}


class State(NamedTuple):
    """The labels of a state that a step returns: a tuple with the fields `key` and `step`."""

    keys: list[Label]
    steps: list[Label]
    clip: list[Label]
    mechanism: list[Label]
    all: list[Label]


def states_of(outputs: Any) -> list[State]:
    """Returns the states in a tree of labels."""
    found = []

    def visit(node: Any) -> bool:
        if {"key", "step"} <= set(getattr(node, "_fields", ())):
            held = [getattr(node, name, ()) for name in ("clip_state", "mechanism_state")]
            found.append(State(*map(jax.tree.leaves, (node.key, node.step, *held, node))))
        return False

    jax.tree.leaves(outputs, is_leaf=visit)
    return found


def repeated(
    records: Records,
    outputs: dict[str, Label],
    inputs: Inputs,
    states: list[State],
    alike: dict[str, str],
) -> tuple[list[Leak], list[str]]:
    """Returns releases and batches that every call repeats, and what is left to the caller.

    A step is the body of a loop that its caller runs: what it returns goes into the next call.
    `alike` says which part of the output goes to the place of an argument.
    """
    leaks, assumptions = [], []
    for event in records.events:
        again = _AGAIN[event.kind]
        known = [source for source in _sources(event) if source in inputs.names]
        held = [source for source in known if source in inputs.in_state]
        free = [source for source in known if source not in inputs.in_state]
        names = ", ".join(inputs.names[one] for one in held or known)
        not_returned = f"{again}: the state after it is not returned ({names})"
        if any(_moves_on(records, event, source, outputs, inputs, alike) for source in free):
            continue
        if held:
            if not _all_move_on(records, event, held, states):
                leaks.append(Leak("", not_returned, event.where))
        elif not known:
            leaks.append(Leak("", f"{again}: its key is no argument of the step", event.where))
        elif any(
            _derived(source, list(outputs.values()))
            or _at_place(inputs.names[source], outputs, alike)
            for source in known
        ):
            leaks.append(Leak("", not_returned, event.where))
        else:
            names = " or ".join(inputs.names[one] for one in known)
            assumptions.append(f"The caller passes another {names} in each call.")
    return leaks, assumptions


def _all_move_on(records: Records, event: Event, held: list[Any], states: list[State]) -> bool:
    """Whether a state with one of these keys is returned, and each such state is a later one."""
    own = [state for state in states if _has_one_of(state, held)]
    return bool(own) and all(
        _goes_on(records, event, _after_call(event, state))
        and not any(map(_is_first, state.mechanism))
        and _is_in_order(event, state)
        for state in own
    )


def _has_one_of(state: State, held: list[Any]) -> bool:
    """Whether a state has one of these keys, or a number that follows from one of these."""
    numbers = [label.number for label in state.steps if label.number is not None]
    paths = [path[0] for label in state.keys for path in label.paths]
    return any(one in held for one in (*paths, *_names_in(numbers)))


def _is_in_order(event: Event, state: State) -> bool:
    """Whether a state is as a sampler or the last release left it, where that matters."""
    if event.kind == "count":
        return in_order([*state.steps, *state.clip, *state.mechanism])
    if event.kind == "release" or type(event.detail) in INDEPENDENT:
        return True
    found = {label.state for label in state.all}
    return len(found) == 1 and None not in found


def _after_call(event: Event, state: State) -> dict[Any, Any]:
    """Returns what follows the key and the number of a state in the next call."""
    following: dict[Any, Any] = {"loop": ()}
    following |= {one: None for one in _sources(event) if one[0] != "root"}
    for label in state.steps:
        if label.number is not None:
            following |= dict.fromkeys(_names_in([label.number]), label.number)
    paths = {path for label in state.keys for path in label.paths}
    for path in paths:
        following[path[:1]] = path if len(paths) == 1 else None
    return following


def _goes_on(
    records: Records, event: Event, following: dict[Any, Any], differing: Any = None
) -> bool:
    """Whether an event is another one in the next calls, and no call draws from its key before."""
    later: Event | None = event
    differing = differing or records.is_beyond
    others = [one for one in records.events if one.kind == event.kind]
    for _ in range(_CALLS):
        later = None if later is None else next_event(later, following)
        if later is None or not all(are_distinct(later, one, differing) for one in others):
            return False
    return not records.draws_ahead([event], records.draws, following)


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
    return list(dict.fromkeys([*found, *_names_in(numbers)]))


def _names_in(numbers: list[Number]) -> list[Any]:
    """Returns the names of numbers that loops start from, and of all others."""
    found, left = [], [*numbers]
    while left:
        for name, _ in left.pop().terms:
            if len(name) == 4 and isinstance(name[3], Number):
                left.append(name[3])
            else:
                found.append(name)
    return found


def _moves_on(
    records: Records,
    event: Event,
    source: Any,
    outputs: dict[str, Label],
    inputs: Inputs,
    alike: dict[str, str],
) -> bool:
    """Whether the step returns the next value of a key or a number that is in no state."""
    same = _at_place(inputs.names[source], outputs, alike)
    found = _derived(source, same or list(outputs.values()))
    if source[0] == "root":
        following = [{(source,): path, "loop": ()} for path in found]
        return (source,) not in found and any(
            _goes_on(records, event, one, always_differ) for one in following
        )
    others: dict[Any, Any] = {one: None for one in _sources(event) if one[0] != "root"}
    return bool(found) and all(
        _goes_on(records, event, {**others, source: one, "loop": ()}) for one in found
    )


def _at_place(name: str, outputs: dict[str, Label], alike: dict[str, str]) -> list[Label]:
    """Returns what a step returns at the place of an argument of this name."""
    start, place = _ARGUMENT.findall(name)[0]
    return [
        label
        for path, label in outputs.items()
        if path == f"{alike.get(start, 'output')}{place}"
        or (start not in alike and place and re.sub(r"^output(\[\d+\])?", "", path) == place)
    ]


def _derived(source: Any, labels: list[Label]) -> list[Any]:
    """Returns the keys, or the numbers, among values that follow from an argument."""
    if source[0] == "root":
        return [path for label in labels for path in label.paths if path[0] == source]
    numbers = [label.number for label in labels if label.number is not None]
    return [one for one in numbers if source in _names_in([one])]
