"""Data as people have them, as columns: a tree of arrays with one row per example.

Classes of other libraries are recognized by what they can do, so that none is imported. Errors name
the column, and never show a value.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from dpoptax._pytree import PyTree
from dpoptax.training._examples import (
    as_example,
    check_numeric,
    fields_of,
    not_an_array,
    stack_examples,
)

INDEX = (
    "Index, do not iterate: the sampler of the plan chooses the rows of each step by their index. "
    "Pass a dict of arrays, or HostData(source) with len(source) and source[index]"
)


def as_columns(data: Any, name: str = "data") -> PyTree:
    """Returns a tree of arrays with one row per example.

    Args:
        data: a tree of arrays; a list of rows; a table with named columns (pandas, polars, Arrow, a
            NumPy structured array); or dicts and tuples of these. A list holds one entry per
            example, a dict or a tuple one entry per column.
        name: what errors call the data.

    Returns:
        A tree with arrays of NumPy or JAX, or memory maps, which are not read.

    Raises:
        TypeError: a column is not numeric, or the data can only be iterated over.
        ValueError: rows differ in shape, or a number does not fit into 32 bits.
    """
    refuse_stream(data, name)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _column(name + jax.tree_util.keystr(path), leaf),
        data,
        # JAX warns of iterables that it does not know, unless they are said to be leaves.
        is_leaf=lambda node: isinstance(node, list) or jax.tree_util.all_leaves([node]),
    )


def is_source(data: Any) -> bool:
    """Whether `data[index]` is one example, as in a data set of PyTorch, Grain or Hugging Face."""
    return (
        jax.tree_util.all_leaves([data])
        and hasattr(data, "__len__")
        and hasattr(data, "__getitem__")
        and not isinstance(data, str | bytes | Mapping)
        and not _is_array(data)
        and not _table_names(data)
    )


def refuse_stream(data: Any, name: str = "data") -> None:
    """Raises for what can only be iterated over, with the remedy for its kind."""
    if not jax.tree_util.all_leaves([data]) or isinstance(data, list):
        return
    kind = type(data).__name__
    if isinstance(data, str | bytes):
        raise TypeError(f"{name} must be arrays; got a string. Load the data first.")
    if hasattr(data, "dataset") and hasattr(data, "batch_size"):
        raise TypeError(
            f"{name} must have random access; got a {kind}, which draws and shuffles batches by "
            "itself. They do not come from the sampler of the plan, so epsilon would be wrong. "
            f"{INDEX}: for a loader, HostData(loader.dataset)."
        )
    if hasattr(data, "element_spec") and hasattr(data, "as_numpy_iterator"):
        raise TypeError(
            f"{name} must have random access; got a tf.data {kind}, which is a stream. {INDEX}: "
            "tfds.data_source(...) has the same data, or read all rows at once by "
            "next(data.batch(num_examples).as_numpy_iterator())."
        )
    if hasattr(data, "__iter__") and not (
        hasattr(data, "__getitem__") and hasattr(data, "__len__")
    ):
        raise TypeError(f"{name} must have random access; got a {kind}. {INDEX}.")


def _column(label: str, leaf: Any) -> PyTree:
    """Returns a column as an array, or a table as a dict of columns."""
    if isinstance(leaf, jax.Array):
        return leaf
    if isinstance(leaf, list):
        return _stack_list(label, leaf)
    if names := _table_names(leaf):
        columns = dict(_table_columns(leaf, names))
        if len(columns) != len(names):
            raise ValueError(f"{label} must have one name per column; got a name twice. Rename it.")
        return {key: _column(f"{label}[{key!r}]", column) for key, column in columns.items()}
    if hasattr(leaf, "toarray"):
        _refuse(label, "a sparse matrix", "Pass a dense array: data.toarray()")
    if _is_array(leaf):
        return _array(label, leaf)
    if isinstance(leaf, bool | int | float | complex | np.generic):
        return leaf  # refused with the other leaves that have no leading axis
    remedy = "Pass an array with one row per example"
    if is_source(leaf):
        remedy = "Pass one data set alone, HostData(source), whose examples have all columns"
    _refuse(label, f"a {type(leaf).__name__}", remedy)


def _stack_list(label: str, rows: list[Any]) -> PyTree:
    """Returns a list with one entry per example as an array, or a tree of arrays."""
    if not rows:
        raise ValueError(f"{label} must have at least one example; got an empty list.")
    # One conversion is much faster than one per row, where the rows are plain numbers.
    if all(isinstance(row, bool | int | float) for row in rows):
        return _array(label, np.asarray(rows))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _array(label + jax.tree_util.keystr(path), leaf),
        stack_examples([as_example(row, label) for row in rows], label),
    )


def _array(label: str, leaf: Any) -> Any:
    """Returns an array of numbers; one that is not read yet, such as a memory map, as it is."""
    if not isinstance(leaf.dtype, np.dtype) or hasattr(leaf, "to_numpy"):
        # Tensors of other libraries, and the columns of tables.
        try:
            leaf = leaf.to_numpy() if hasattr(leaf, "to_numpy") else np.asarray(leaf)
        except Exception as error:  # of whatever library the column is from
            raise not_an_array(label, leaf, error) from None
    if fields := fields_of(leaf):
        return {name: _array(f"{label}[{name!r}]", item) for name, item in fields.items()}
    if leaf.dtype.kind == "O" and isinstance(leaf, np.ndarray):
        leaf = _unbox(label, leaf)
    check_numeric(label, leaf, "an array of numbers", "strings or other objects")
    _check_range(label, leaf)
    return leaf


def _unbox(label: str, column: np.ndarray) -> np.ndarray:
    """Returns an array of objects as numbers, if each object is a number or an array."""
    if all(isinstance(entry, np.ndarray | list | tuple) for entry in column.flat):
        return np.asarray(_stack_list(label, [np.asarray(entry) for entry in column.flat]))
    if all(isinstance(entry, bool | int | float | np.number) for entry in column.flat):
        return np.asarray(column.tolist())
    return column


def _check_range(label: str, leaf: Any) -> None:
    """Raises where JAX would wrap whole numbers around, without a word."""
    wide = leaf.dtype.kind in "iu" and leaf.dtype.itemsize == 8
    # A memory map is not read here: it may be larger than the memory.
    if (
        not wide
        or jnp.result_type(float) == np.float64
        or type(leaf) is not np.ndarray
        or not leaf.size
    ):
        return
    limits = np.iinfo(np.int32 if leaf.dtype.kind == "i" else np.uint32)
    if leaf.min() < limits.min or leaf.max() > limits.max:
        raise ValueError(
            f"{label} must have whole numbers of 32 bits; got larger ones, which JAX would wrap "
            "around. Renumber them from zero, or set jax_enable_x64."
        )


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _table_names(leaf: Any) -> list[Any]:
    """Returns the names of the columns of a table or mapping; empty for anything else."""
    if isinstance(leaf, Mapping):  # one that JAX does not know, such as an open .npz file
        return list(leaf)
    if hasattr(leaf, "column_names") and hasattr(leaf, "to_pydict"):  # Arrow
        return list(leaf.column_names)
    if hasattr(leaf, "columns") and hasattr(leaf, "to_numpy"):  # pandas and polars
        return list(leaf.columns)
    return []


def _table_columns(leaf: Any, names: list[Any]) -> Iterator[tuple[Any, Any]]:
    by_name = leaf.column if hasattr(leaf, "to_pydict") else leaf.__getitem__
    for name in names:
        column = by_name(name)
        # pandas' own types for missing values and categories become NumPy's here.
        yield name, column.to_numpy() if hasattr(column, "to_numpy") else column


def _refuse(label: str, got: str, remedy: str) -> NoReturn:
    raise TypeError(f"{label} must be an array of numbers; got {got}. {remedy}.")
