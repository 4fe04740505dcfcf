"""A padded batch: the examples, and the mask that says which of its rows are real."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jaxtyping import Array

from dpoptax._pytree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class MaskedExamples:
    """The examples of a padded batch and their mask, as `dpoptax.samplers.take` returns them.

    Pass it to the functions of `per_example_grads`: they apply the mask, so that padded rows
    contribute nothing. A padded row that counted would change the sum even if it is zero: its
    gradient gives way to that of an example that joins the batch, and the sum moves by up to twice
    the clip bound.

    Fields of the examples keep the mask: `x, y = taken` and `taken["x"]` are `MaskedExamples` too.
    `.examples` are the plain arrays, for evaluation. Whoever uses them must apply `.mask`.

    Attributes:
        examples: a tree of arrays with a leading axis `(batch, ...)`; padded rows are zeros.
        mask: bool `(batch,)`; True marks a real example.

    Example:
        >>> import jax.numpy as jnp, dpoptax
        >>> batch = dpoptax.samplers.Batch(jnp.array([2, 3]), jnp.array([True, False]))
        >>> taken = dpoptax.samplers.take({"x": jnp.array([10.0, 11.0, 12.0])}, batch)
        >>> taken.examples["x"].tolist(), taken.mask.tolist()
        ([12.0, 0.0], [True, False])
        >>> halved = MaskedExamples({"x": taken.examples["x"] / 2}, taken.mask)
        >>> grads = dpoptax.per_example_grads(lambda w, row: w * row["x"])(jnp.array(1.0), halved)
        >>> grads.stacked()
        Array([6., 0.], dtype=float32)
    """

    # No shapes in the annotations: inside a scan or a vmap the arrays have more axes, and on the
    # host they are NumPy arrays.
    examples: PyTree
    mask: Any

    def __repr__(self) -> str:
        """Shows shapes only: the examples are private."""

        def describe(leaf: Any) -> str:
            if not hasattr(leaf, "shape"):
                return type(leaf).__name__
            return f"{leaf.dtype}{list(leaf.shape)}"

        return f"MaskedExamples({jax.tree.map(describe, self.examples)})"

    def __getitem__(self, field: Any) -> "MaskedExamples":
        """Returns a field of the examples with the mask."""
        self._refuse_array(f"[{field!r}]" if isinstance(field, str | int) else "[...]")
        return MaskedExamples(self.examples[field], self.mask)

    def __iter__(self) -> Iterator["MaskedExamples"]:
        """Yields the items of a tuple or list of examples, each with the mask."""
        self._refuse_array(" in an unpacking or a loop")
        if not isinstance(self.examples, tuple | list):
            raise TypeError(
                "only a tuple or list of examples can be unpacked; got a "
                f"{type(self.examples).__name__}. Take one field by taken[name]."
            )
        return (MaskedExamples(item, self.mask) for item in self.examples)

    def _refuse_array(self, use: str) -> None:
        if hasattr(self.examples, "shape"):
            raise TypeError(
                "the rows of MaskedExamples belong to their mask, so a single array of examples "
                f"has no fields; got MaskedExamples{use}. Pass the whole to per_example_grads. For "
                "the plain array use .examples, and apply .mask."
            )


def unmasked(tree: PyTree) -> tuple[PyTree, list[Array]]:
    """Returns a tree with plain examples in place of `MaskedExamples`, and all their masks."""
    masks: list[Array] = []

    def open_up(node: Any) -> Any:
        if not isinstance(node, MaskedExamples):
            return node
        masks.append(node.mask)
        examples, inner = unmasked(node.examples)
        masks.extend(inner)
        return examples

    plain = jax.tree.map(open_up, tree, is_leaf=lambda node: isinstance(node, MaskedExamples))
    return plain, masks
