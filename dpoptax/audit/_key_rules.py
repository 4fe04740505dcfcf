"""Key rules: how keys are derived from keys, split, chosen and turned into words."""

from typing import Any

import attrs
import jax.numpy as jnp

from dpoptax import _jax_compat, _validate
from dpoptax.audit._known_keys import root_of_raw_words, root_of_seed
from dpoptax.audit._labels import MIXED, Label, Reason, join
from dpoptax.audit._origins import UNKNOWN, Number, Path
from dpoptax.audit._words import words

_MOVES = words(
    """
    slice squeeze reshape broadcast_in_dim transpose dynamic_slice gather concatenate unstack
    stack select_n rev split convert_element_type tile expand_dims
    """
)

# With the shape unchanged, these keep each key at its place.
_IN_ORDER = words("reshape convert_element_type select_n slice broadcast_in_dim")


def outputs(flow: Any, eqn: Any, labels: list[Label]) -> list[Label] | None:
    """Returns the labels of the outputs, which are keys or the words of one; None for others."""
    name = eqn.primitive.name
    if name == "random_seed":
        return [_seed(flow, eqn, labels[0])]
    if eqn.primitive in _jax_compat.key_primitives():
        if any(label.paths for label in labels):
            return labels
        root = _root(flow, eqn)
        if labels[0].words is not None and "impl" in eqn.params:
            root = root_of_raw_words(labels[0].words, str(getattr(eqn.params["impl"], "name", "")))
        return [attrs.evolve(labels[0], paths=frozenset({(root,)}), words=None)]
    if name == "random_fold_in":
        key, data = labels
        return [_derived(flow, key, ("fold", data.number), [key, data], eqn)]
    if name == "random_split":
        return [_derived(flow, labels[0], ("split", tuple(eqn.params["shape"]), None), labels, eqn)]
    if name in _MOVES and all(_validate.is_key(out.aval) for out in eqn.outvars):
        return [_moved(flow, eqn, labels, number) for number in range(len(eqn.outvars))]
    return None


def _root(flow: Any, eqn: Any) -> Any:
    return ("root", ("computed", flow.inside(eqn)))


def _seed(flow: Any, eqn: Any, label: Label) -> Label:
    known = label.uniform
    is_whole = isinstance(known, int) and not isinstance(known, bool)
    implementation = str(getattr(eqn.params["impl"], "name", ""))
    root = root_of_seed(implementation, known) if is_whole else _root(flow, eqn)
    return attrs.evolve(label, paths=frozenset({(root,)}), number=None, uniform=None)


def _derived(flow: Any, key: Label, part: Any, labels: list[Label], eqn: Any) -> Label:
    paths = frozenset((*path, part) for path in key.paths)
    return _with_data(flow, labels, paths, eqn)


def _moved(flow: Any, eqn: Any, labels: list[Label], output: int) -> Label:
    name = eqn.primitive.name
    keys = [
        label for atom, label in zip(eqn.invars, labels, strict=True) if _validate.is_key(atom.aval)
    ]
    index = _index(eqn, labels, output)
    operand = next(atom for atom in eqn.invars if _validate.is_key(atom.aval))
    in_order = name in _IN_ORDER and operand.aval.shape == eqn.outvars[output].aval.shape
    paths: set[Path] = set()
    for path in (path for label in keys for path in label.paths):
        is_split = _is_many(path[-1]) and path[-1][1] == operand.aval.shape
        if index is not None and is_split and not any(map(_is_many, path[:-1])):
            paths.add((*path[:-1], ("split", path[-1][1], index)))
        elif name in ("concatenate", "stack") and len(keys) > 1:
            paths.add((*path, UNKNOWN))
        elif any(map(_is_many, path)) and not in_order:
            # Keys may be repeated now, and have other places.
            paths.add((*path, UNKNOWN))
        else:
            paths.add(path)
    return _with_data(flow, labels, frozenset(paths), eqn)


def _is_many(part: Any) -> bool:
    """Whether a part of a path says that a key is split, and not which of the new keys is meant."""
    return bool(part[0] == "split" and part[2] is None)


def _index(eqn: Any, labels: list[Label], output: int) -> Number | None:
    """Returns which of a vector of keys an equation selects, if it selects one."""
    name, params = eqn.primitive.name, eqn.params
    if jnp.ndim(eqn.invars[0].aval) != 1:
        return None
    if name == "unstack":
        return Number(offset=output)
    if name == "slice" and params["limit_indices"][0] - params["start_indices"][0] == 1:
        return Number(offset=params["start_indices"][0])
    if name == "dynamic_slice" and tuple(params["slice_sizes"]) == (1,):
        # An index beyond the end selects the last key.
        number, count = labels[1].number, eqn.invars[0].aval.shape[0]
        if number is not None and not number.terms and 0 <= number.offset < count:
            return number
    return None


def _with_data(flow: Any, labels: list[Label], paths: frozenset[Path], eqn: Any) -> Label:
    # A number that is folded in may be random.
    made_of = [
        label
        for atom, label in zip(eqn.invars, labels, strict=True)
        if not _validate.is_key(atom.aval)
    ]
    found = labels[0]
    for label in labels[1:]:
        found = join(found, label)
    data, reason = found.data, found.reason
    # Keys may have moved to other rows.
    if data is not None:
        data = MIXED
        reason = reason or Reason("a key depends on private data", flow.line(eqn))
    draws = found.draws.union(*(label.paths for label in made_of))
    return Label(data=data, draws=draws, paths=paths, released=found.released, reason=reason)
