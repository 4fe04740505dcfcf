"""Slots: what a step returns goes into its arguments in the next call, each value at its place.

A key that a step returns at the place of another one is used there in the next call, and a secret
at the place of parameters is read. So keys and secrets must stay at their places.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

import jax

from dpoptax import _validate
from dpoptax.audit._certificate import Leak
from dpoptax.audit._labels import Label
from dpoptax.audit._states import Place, places_of

# For each place, the roots of the keys and secrets that the arguments have there.
Slots: TypeAlias = dict[Any, set[Any]]


def roots_of(label: Label) -> set[Any]:
    """Returns the roots of a key, or of a secret that a mechanism or a sampler keeps."""
    drawn = label.draws if label.declared else frozenset()
    return {path[0] for path in (*label.paths, *drawn)}


def slots_of(args: tuple[Any, ...], labels: list[Label], private: set[int]) -> Slots:
    """Returns what the places of the arguments hold, the private ones left out."""
    places = places_of(args)
    of_state: dict[int, set[Any]] = {}
    for place, label in zip(places, labels, strict=True):
        if place is not None:
            of_state.setdefault(place.number, set()).update(roots_of(label))
    found: Slots = {}
    number = 0
    for argument, tree in enumerate(args):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        structure = _structure(tree)
        for position, (path, _) in enumerate(leaves):
            place, label = places[number], labels[number]
            number += 1
            if argument in private:
                continue
            allowed = roots_of(label) if place is None else of_state[place.number]
            found["part", f"args[{argument}]", jax.tree_util.keystr(path)] = allowed
            for slot in _slots(jax.tree_util.keystr(path), place, structure, position):
                found.setdefault(slot, set()).update(allowed)
    return found


def alike_outputs(args: tuple[Any, ...], outputs: Any) -> dict[str, str]:
    """Returns which part of the output goes to the place of each argument.

    It is the one of the same structure, shapes and types, in the order of the arguments.
    """
    left = {"output": outputs}
    if type(outputs) in (tuple, list):
        left = {f"output[{number}]": part for number, part in enumerate(outputs)}
    found = {}
    for number, argument in enumerate(args):
        own = _whole_structure(argument)
        for name in [name for name, part in left.items() if _whole_structure(part) == own][:1]:
            found[f"args[{number}]"] = name
            del left[name]
    return found


def moved(
    slots: Slots, outputs: Any, labels: list[Label], paths: list[str], alike: dict[str, str]
) -> Iterator[Leak]:
    """Yields the keys and secrets that a step returns at the place of something else."""
    names = {output: name for name, output in alike.items()}
    leaves, places = jax.tree.leaves(outputs), places_of(outputs)
    own = [[*found] for found in _output_slots(outputs, places)]
    starts = sorted(names, key=len, reverse=True)
    for leaf, label, path, found in zip(leaves, labels, paths, own, strict=True):
        if not (_validate.is_key(leaf) or label.declared):
            continue
        roots = roots_of(label)
        whole = next((one for one in starts if _is_in(path, one)), "")
        found = [*found, ("part", names.get(whole), path[len(whole) :])]
        if any(slot in slots and not (roots and roots <= slots[slot]) for slot in found):
            what = "a key or a secret is returned at the place of something else"
            yield Leak(path, what, "")


def _output_slots(outputs: Any, places: list[Place | None]) -> Iterator[set[Any]]:
    """Yields the slots of each leaf: in the whole output, and in a part of a tuple."""
    whole = _structure(outputs)
    parts = list(outputs) if type(outputs) in (tuple, list) else [outputs]
    number = 0
    for part in parts:
        structure = _structure(part)
        for position, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(part)):
            slots = _slots(jax.tree_util.keystr(path), places[number], structure, position)
            yield {*slots, *_slots("", None, whole, number)}
            number += 1


def _slots(path: str, place: Place | None, structure: Any, position: int) -> Iterator[Any]:
    if path:
        yield "path", path
    if place is not None:
        yield "state", place.cls
    if structure is not None:
        yield "structure", structure, position


def _is_in(path: str, start: str) -> bool:
    rest = path.removeprefix(start)
    return path.startswith(start) and (not rest or rest[0] in "[.")


def _structure(tree: Any) -> Any:
    """Returns what tells a tree from others; None for a single leaf."""
    is_leaf = jax.tree_util.treedef_is_leaf(jax.tree.structure(tree))
    return None if is_leaf else _whole_structure(tree)


def _whole_structure(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((tuple(jax.numpy.shape(x)), str(_dtype(x))) for x in leaves)


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jax.numpy.result_type(leaf)
