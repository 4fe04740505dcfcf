"""Groups of parameters: which leaves belong to which group, by the path of a leaf.

A path is the names on the way to a leaf, such as `encoder/dense/kernel`, whatever kinds of nodes
hold them. So a group that was read from JSON fits the tree that it was written for.
"""

from collections.abc import Collection, Sequence
from typing import Any

import jax

from dpoptax._pytree import PyTree

SEPARATOR = "/"
# How many names an error lists.
_MAX_NAMES = 5


def by_path(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths; a tree that is one leaf has the path "".

    Raises:
        ValueError: two leaves have the same path.
    """
    found: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator=SEPARATOR)
        if path in found:
            raise ValueError(
                f"parameters must have different paths, to be told apart; got two with the path "
                f"{path}, for example because a name contains {SEPARATOR!r}. Rename one of them."
            )
        found[path] = leaf
    return found


def check_disjoint(groups: Collection[str]) -> None:
    """Raises if a group is a part of another one."""
    for group in groups:
        for other in _prefixes(group)[:-1]:
            if other in groups:
                raise ValueError(
                    "groups must not overlap, because each parameter is clipped once; got "
                    f"{_named(other)} and its part {_named(group)}. Leave one of them out."
                )


def groups_of(tree: PyTree, groups: Collection[str]) -> list[str]:
    """Returns the group of each leaf, in the order of the leaves.

    Raises:
        ValueError: a leaf belongs to no group, or a group has no leaf.
    """
    paths = list(by_path(tree))
    found = [next((name for name in _prefixes(path) if name in groups), None) for path in paths]
    outside = [path for path, group in zip(paths, found, strict=True) if group is None]
    unused = [group for group in groups if group not in found]
    if outside or unused:
        raise ValueError(
            "the groups of a clip rule must cover all parameters, and nothing else; parameters "
            f"without a group: {_listed(outside)}; groups without a parameter: {_listed(unused)}. "
            "Name each group by the path of a parameter, or by the beginning of some paths, such "
            'as "encoder" or "encoder/kernel".'
        )
    return [group for group in found if group is not None]


def _prefixes(path: str) -> list[str]:
    """Returns the path and its beginnings, from the empty one on."""
    parts = path.split(SEPARATOR) if path else []
    return [SEPARATOR.join(parts[:length]) for length in range(len(parts) + 1)]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return f"[{', '.join(map(_named, names[:_MAX_NAMES]))}]{more}"


def _named(path: str) -> str:
    return path if path else "the whole tree"
