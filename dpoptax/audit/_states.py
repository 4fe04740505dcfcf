"""States in a tree: tuples with the fields `key` and `step`, of samplers and of `privatize`."""

from typing import Any

import attrs
import jax

from dpoptax._package_classes import is_of_package

# The fields of a state of `privatize` that move on together, in their order.
_TOGETHER = ("step", "clip_state", "mechanism_state")


@attrs.frozen
class Place:
    """Where a leaf is in a state.

    Attributes:
        number: of the state.
        of_release: it is a state of `privatize`, and not of a sampler.
        cls: the class of the state.
        field: the field of the state that has the leaf.
        position: of the leaf among those that must move on together; None for others.
    """

    number: int
    of_release: bool
    cls: type
    field: str
    position: int | None

    @property
    def is_noise(self) -> bool:
        """Whether a mechanism keeps it."""
        return self.field == "mechanism_state"

    @property
    def is_table(self) -> bool:
        """Whether a sampler of the package keeps it, such as the order of the examples."""
        own = is_of_package(self.cls, "dpoptax") and not self.of_release
        return own and self.field not in ("key", "step")


def places_of(tree: Any) -> list[Place | None]:
    """Returns the place of each leaf of a tree; None for leaves outside of states."""
    leaves, structure = jax.tree.flatten(tree)
    # One array may be several leaves, so they are numbered.
    numbered = jax.tree.unflatten(structure, [_Leaf(number) for number in range(len(leaves))])
    found: list[Place | None] = [None] * len(leaves)
    count = 0

    def visit(node: Any) -> bool:
        nonlocal count
        fields = getattr(node, "_fields", ())
        if {"key", "step"} <= set(fields):
            of_release, position = "mechanism_state" in fields, 0
            for field in fields:
                for leaf in jax.tree.leaves(getattr(node, field)):
                    together = of_release and field in _TOGETHER
                    found[leaf.number] = Place(
                        count, of_release, type(node), field, position if together else None
                    )
                    position += together
            count += 1
        return False

    jax.tree.leaves(numbered, is_leaf=visit)
    return found


class _Leaf:
    def __init__(self, number: int) -> None:
        self.number = number
