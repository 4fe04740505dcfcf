"""Single examples of a data source, as a tree of NumPy arrays, and how they are stacked."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpoptax._pytree import PyTree


def as_example(row: Any, name: str = "data") -> PyTree:
    """Returns one example as a tree of arrays.

    A list of numbers is one array. A list of arrays is several fields, as a tuple is.

    Raises:
        TypeError: a field is not numeric.
        ValueError: a list has entries of different lengths.
    """
    if row is None:
        raise TypeError(
            f"{name} must have an example at every index; got None. Remove the rows that are "
            "filtered out, and make the sampler with the number of those that remain."
        )
    # Rows that are arrays already are the usual case, and this runs once per row.
    if type(row) in (np.ndarray, tuple, dict) and all(map(_is_numeric, jax.tree.leaves(row))):
        return row
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _field(name + jax.tree_util.keystr(path), leaf),
        dict(row) if isinstance(row, Mapping) else row,
        is_leaf=lambda node: (
            jax.tree_util.all_leaves([node])
            or (isinstance(node, list) and not any(map(_is_field, node)))
        ),
    )


def not_an_array(label: str, leaf: Any, error: Exception) -> TypeError:
    """Returns the error for a value that NumPy cannot convert; it shows no value."""
    return TypeError(
        f"{label} must become a NumPy array; got a {type(leaf).__name__} that cannot "
        f"({type(error).__name__}). Convert it first: detached, on the CPU, float32."
    )


def _is_numeric(leaf: Any) -> bool:
    return type(leaf) is np.ndarray and leaf.dtype.kind in "biufc"


def _is_field(entry: Any) -> bool:
    """Whether an entry of a list is a field of an example, and not a number or rows of numbers."""
    return isinstance(entry, Mapping | tuple) or (hasattr(entry, "shape") and np.ndim(entry) > 0)


def _field(label: str, leaf: Any) -> PyTree:
    if isinstance(leaf, Mapping):
        return {key: _field(f"{label}[{key!r}]", item) for key, item in leaf.items()}
    try:
        array = np.asarray(leaf)
    except Exception as error:  # of whatever library the field is from
        if isinstance(leaf, list):
            raise ValueError(
                f"{label} must have one shape; got a list whose entries differ in length. Pad "
                "them to one length, and add a mask of what is real."
            ) from None
        raise not_an_array(label, leaf, error) from None
    if fields := fields_of(array):
        return {key: _field(f"{label}[{key!r}]", item) for key, item in fields.items()}
    got = "text" if array.dtype.kind in "US" else f"a {type(leaf).__name__}"
    check_numeric(label, array, "a number or an array of numbers", got)
    return array


def fields_of(array: Any) -> dict[str, Any]:
    """Returns the fields of a structured array by name; empty for any other array."""
    return {name: array[name] for name in array.dtype.names or ()}


def check_numeric(label: str, array: Any, expected: str, got: str) -> None:
    """Raises for an array of text, dates or objects; `got` says what it is to the caller."""
    kind = array.dtype.kind
    if kind in "mM":
        got, remedy = "dates", "Turn them into numbers, such as days since a public date"
    elif kind in "USO":
        remedy = (
            "Leave the column out, or turn it into numbers: class names into their index, text "
            "into token ids, missing values into a number and a mask"
        )
    elif not (jnp.issubdtype(array.dtype, jnp.number) or kind == "b"):
        got = f"values of type {array.dtype}"
        remedy = "Convert the column to float32 or int32"
    else:
        return
    raise TypeError(f"{label} must be {expected}; got {got}. {remedy}.")


def stack_examples(
    examples: Sequence[PyTree], name: str = "data", like: PyTree | None = None
) -> PyTree:
    """Returns the examples along a new leading axis.

    Args:
        examples: from `as_example`, at least one.
        name: what errors call the data.
        like: an example whose shapes and types all others must have; by default the first one.

    Raises:
        ValueError: examples differ in their fields or shapes, or in types that `like` cannot hold.
    """
    first = examples[0] if like is None else like
    structure: Any = jax.tree.structure(first)
    columns: list[list[Any]] = [[] for _ in jax.tree.leaves(first)]
    for example in examples:
        if jax.tree.structure(example) != structure:
            raise ValueError(
                f"{name} must have the same fields in every example; got examples that differ in "
                "them. Fill missing fields with a number, and add a mask of what is real."
            )
        for column, leaf in zip(columns, jax.tree.leaves(example), strict=True):
            column.append(leaf)
    paths = jax.tree_util.tree_leaves_with_path(first)
    stacked = []
    for (path, leaf), column in zip(paths, columns, strict=True):
        label = name + jax.tree_util.keystr(path)
        if any(other.shape != leaf.shape for other in column):
            raise ValueError(
                f"{label} must have one shape in every example; got different ones. Pad to one "
                "length, and add a mask of what is real. A list has one entry per example: for a "
                "list of columns, pass a tuple or a dict."
            )
        array = np.stack(column)
        if like is not None and array.dtype != leaf.dtype:
            # A program is compiled for one type. Rounding 0.5 to a whole number would be silent.
            if not np.can_cast(array.dtype, leaf.dtype, "same_kind"):
                raise ValueError(
                    f"{label} must have one type in every example; got {leaf.dtype} in the first "
                    f"one and {array.dtype} later. Convert the column to {array.dtype}."
                )
            array = array.astype(leaf.dtype)
        stacked.append(array)
    return jax.tree.unflatten(structure, stacked)
