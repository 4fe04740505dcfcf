"""The type of a tree of arrays: any container that `jax.tree.map` takes, with arrays as leaves.

At run time it is jaxtyping's `PyTree`, so that `PyTree[Float[Array, " batch"]]` can be checked.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import TypeAliasType, TypeVar

    # jaxtyping's own is an unknown type to Pyright, and so would be all that a user gets from us.
    _Leaf = TypeVar("_Leaf", default=Any)
    PyTree = TypeAliasType("PyTree", Any, type_params=(_Leaf,))
else:
    from jaxtyping import PyTree

__all__ = ["PyTree"]
