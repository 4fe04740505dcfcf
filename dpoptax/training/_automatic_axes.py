"""Training on a mesh with explicit axes: runs with automatic ones, and converts what it returns."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

from dpoptax._explicit_axes import (
    automatic_mesh,
    concrete_explicit_mesh,
    to_automatic,
    to_explicit,
)
from dpoptax._pytree import PyTree
from dpoptax.training._data import as_training_data

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class AutomaticAxes:
    """The mesh of a run, if it has explicit axes.

    Attributes:
        mesh: the mesh of the caller; None if it has no explicit axes.
    """

    mesh: jax.sharding.Mesh | None

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context with the same devices and automatic axes."""
        if self.mesh is None:
            return contextlib.nullcontext()
        return jax.set_mesh(automatic_mesh(self.mesh))

    def entering(self, tree: PyTree) -> PyTree:
        """Returns what the caller passed, for use in the context."""
        return tree if self.mesh is None else to_automatic(tree)

    def leaving(self, tree: PyTree) -> PyTree:
        """Returns results of the context on the mesh of the caller."""
        return tree if self.mesh is None else to_explicit(tree, self.mesh)


def enter_automatic_axes(
    params: PyTree, data: PyTree, key: Any
) -> tuple[AutomaticAxes, PyTree, PyTree, Any]:
    """Returns the mesh of a run, and its parameters, data and key for use in the context."""
    data = as_training_data(data)
    arrays = getattr(data, "arrays", None)
    sharding = getattr(data.take, "sharding", None)
    axes = AutomaticAxes(concrete_explicit_mesh(params, arrays, sharding))
    if axes.mesh is not None and arrays is not None:
        data = dataclasses.replace(data, arrays=axes.entering(arrays))
    return axes, axes.entering(params), data, axes.entering(key)


def with_automatic_axes(fit: Function) -> Function:
    """Makes `fit` accept parameters and data on a mesh with explicit axes."""

    @functools.wraps(fit)
    def wrapped(loss_fn: Any, params: Any, data: Any, *, key: Any = None, **options: Any) -> Any:
        axes, params, data, key = enter_automatic_axes(params, data, key)
        with axes.context():
            result = fit(loss_fn, params, data, key=key, **options)
        if axes.mesh is None:
            return result
        state = axes.leaving(result.state)
        return dataclasses.replace(result, params=state.params, state=state)

    return cast(Function, wrapped)
