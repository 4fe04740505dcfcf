"""Training on a mesh with explicit axes: `fit` runs with automatic ones and converts the result."""

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
from dpoptax.training._data import as_training_data

Function = TypeVar("Function", bound=Callable[..., Any])


def with_automatic_axes(fit: Function) -> Function:
    """Makes `fit` accept parameters and data on a mesh with explicit axes."""

    @functools.wraps(fit)
    def wrapped(loss_fn: Any, params: Any, data: Any, *, key: Any = None, **options: Any) -> Any:
        data = as_training_data(data)
        arrays = getattr(data, "arrays", None)
        mesh = concrete_explicit_mesh(params, arrays, getattr(data.take, "sharding", None))
        if mesh is None:
            return fit(loss_fn, params, data, key=key, **options)
        params, key = to_automatic(params), to_automatic(key)
        if arrays is not None:
            data = dataclasses.replace(data, arrays=to_automatic(arrays))
        with jax.set_mesh(automatic_mesh(mesh)):
            result = fit(loss_fn, params, data, key=key, **options)
        state = to_explicit(result.state, mesh)
        return dataclasses.replace(result, params=state.params, state=state)

    return cast(Function, wrapped)
