"""Checks of the data, row by row: what a density cannot take is refused before training.

Such an example would contribute nothing, or would have an infinite loss, without a word. No message
shows a value, or says how many rows there are.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array

from dpoptax._pytree import PyTree
from dpoptax.vi.numpyro import _sites as sites

# Examples that are evaluated together. More are faster and need more memory.
CHECK_BATCH = 256
# A support may depend on latents: only a row that is outside for each of several draws is refused.
_DRAWS = 3
_EXPECTED = {
    "_Boolean": "0 or 1",
    "_Simplex": "shares that are not negative and sum to 1",
    "_Multinomial": "counts that sum to total_count",
    "_IntegerInterval": "whole numbers within its bounds",
    "_IntegerGreaterThan": "whole numbers from its lower bound up",
    "_IntegerNonnegative": "whole numbers from 0 up",
    "_IntegerPositive": "whole numbers from 1 up",
    "_UnitInterval": "numbers from 0 to 1",
    "_Positive": "numbers above 0",
    "_GreaterThan": "numbers above its lower bound",
    "_GreaterThanEq": "numbers from its lower bound up",
    "_LessThan": "numbers below its upper bound",
    "_Interval": "numbers within its bounds",
    "_Nonnegative": "numbers from 0 up",
}


def check_data(
    program: sites.Program,
    params: Mapping[str, PyTree],
    constrain: Callable[[PyTree], dict[str, PyTree]],
    local: Collection[str],
    data: PyTree,
) -> None:
    """Refuses data that have no finite density, or that the initial parameters were taken from.

    Args:
        program: the model and its guide.
        params: initial parameters on the real line.
        constrain: maps them to the values of `numpyro.param` sites.
        local: names of the sites in plates over the data.
        data: all arguments of the model that have a leading axis of examples.
    """
    leaves = jax.tree.leaves(data)
    # Inside a transformation of JAX the values are unknown.
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return
    # NumPy, because the number of these rows decides a shape.
    columns = [np.asarray(leaf) for leaf in leaves]
    _check_initial_values(constrain(dict(params)), columns)
    broken = np.zeros(len(columns[0]), bool)
    for column in columns:
        if jnp.issubdtype(column.dtype, jnp.inexact):
            broken |= ~np.isfinite(column).reshape(len(column), -1).all(axis=1)
    with numpyro.validation_enabled(False):
        if broken.any():
            rows = jax.tree.map(lambda leaf: jnp.asarray(leaf)[np.flatnonzero(broken)], data)
            _check_finite(program, params, constrain, local, rows)
        _check_rows(program, constrain(dict(params)), local, data)


def _check_finite(
    program: sites.Program,
    params: Mapping[str, PyTree],
    constrain: Callable[[PyTree], dict[str, PyTree]],
    local: Collection[str],
    rows: PyTree,
) -> None:
    """Refuses NaN and infinity that reach a density or its gradient: a mask may keep them out."""

    def densities(params: PyTree, example: PyTree) -> dict[str, Array]:
        batch = sites.repeat_example(example)
        model, guide = program.trace(constrain(params), batch, jax.random.key(0))
        found = {name: sites.log_prob(site) for name, site in sites.sample_sites(guide)}
        found |= {name: sites.log_prob(site) for name, site in sites.sample_sites(model)}
        return {name: value for name, value in found.items() if name in local}

    def is_broken(example: PyTree) -> dict[str, Array]:
        values = densities(dict(params), example)
        gradients = jax.jacrev(densities)(dict(params), example)
        return {
            name: ~functools.reduce(
                jnp.logical_and,
                [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradients[name])],
                jnp.isfinite(value),
            )
            for name, value in values.items()
        }

    for name, is_broken_row in _over_rows(is_broken, rows).items():
        if jnp.any(is_broken_row):
            raise ValueError(
                f"data hold NaN or infinity, and the density of site {name!r} or its gradient is "
                "not finite there: the example would contribute nothing. Where x is missing, "
                "select a number before the model uses it: x = jnp.where(observed, x, 0.0), "
                "observed = ~jnp.isnan(x). For a missing observation also put the site within "
                "numpyro.handlers.mask(mask=observed)."
            )


def _check_rows(
    program: sites.Program, values: Mapping[str, PyTree], local: Collection[str], data: PyTree
) -> None:
    """Refuses observations outside their support, and rows without a finite density."""
    supports: dict[str, Any] = {}

    def checks(example: PyTree) -> dict[str, dict[str, Array]]:
        outside, infinite = [], []
        for seed in range(_DRAWS):
            model, guide = program.trace(
                values, sites.repeat_example(example), jax.random.key(seed)
            )
            checked = {
                name: site for name, site in sites.sample_sites(model) if sites.has_support(site)
            }
            supports.update({name: site["fn"].support for name, site in checked.items()})
            outside.append({name: ~jnp.all(sites.in_support(s)) for name, s in checked.items()})
            infinite.append(
                {
                    name: ~jnp.isfinite(sites.log_prob(site))
                    for trace in (guide, model)
                    for name, site in sites.sample_sites(trace)
                    if name in local
                }
            )
        return {"outside": _in_every_draw(outside), "infinite": _in_every_draw(infinite)}

    found = _over_rows(checks, jax.tree.map(jnp.asarray, data))
    for name, is_outside in found["outside"].items():
        if jnp.any(is_outside):
            raise ValueError(
                f"observations of site {name!r} lie outside the support of their distribution, "
                f"which takes {_expected(supports[name])}. Recode the column, or choose a "
                "distribution for what it holds. Where a value is missing, put the site within "
                "numpyro.handlers.mask."
            )
    for name, is_infinite in found["infinite"].items():
        if jnp.any(is_infinite):
            raise ValueError(
                f"the density of site {name!r} is not finite for some rows at the initial "
                "parameters: these examples would contribute nothing. The model may take the "
                "logarithm of 0, or the exponential of a large number. Recode such columns, or "
                "standardise them with public numbers."
            )


def _in_every_draw(draws: list[dict[str, Array]]) -> dict[str, Array]:
    return {name: jnp.stack([draw[name] for draw in draws]).all() for name in draws[0]}


def _check_initial_values(initial: Mapping[str, PyTree], columns: list[np.ndarray]) -> None:
    """Refuses parameters that start at a mean, median or other statistic of the data."""
    statistics: list[np.ndarray] = []
    for column in columns:
        if not jnp.issubdtype(column.dtype, jnp.number):
            continue
        table = np.asarray(column, np.float64)
        table = table[np.isfinite(table).reshape(len(table), -1).all(axis=1)]
        if len(table) < 2:
            continue
        found = [table.mean(0), table.std(0), table.std(0, ddof=1), np.median(table, axis=0)]
        found += [table.min(0), table.max(0), table.var(0), table[0], table.mean(), table.std()]
        statistics += [value for value in map(np.atleast_1d, found) if _is_telling(value)]
    statistics += [np.log(value) for value in statistics if np.all(value > 0)]
    for name, tree in initial.items():
        for leaf in map(np.atleast_1d, jax.tree.leaves(tree)):
            if any(_holds(leaf, value) for value in statistics):
                raise ValueError(
                    f"the parameter {name!r} starts at a statistic of the data, such as a mean or "
                    "a row. That is not private. Start from a constant, or from numbers that you "
                    "may publish."
                )


def _holds(leaf: np.ndarray, value: np.ndarray) -> bool:
    """Whether a parameter is a statistic, or holds it among other latents, as AutoContinuous."""
    if value.shape == leaf.shape:
        return np.allclose(value, leaf, rtol=1e-6, atol=0)
    # One number alone may be among many by chance.
    if leaf.ndim != 1 or value.ndim != 1 or not 1 < len(value) < len(leaf):
        return False
    windows = np.lib.stride_tricks.sliding_window_view(leaf, len(value))
    return bool(np.isclose(windows, value, rtol=1e-6, atol=0).all(axis=1).any())


def _is_telling(value: np.ndarray) -> bool:
    """Whether numbers can hardly be constants that a person chose, such as 0, 1 or 0.25."""
    thousands = value * 1000
    return not np.allclose(thousands, np.round(thousands), rtol=0, atol=1e-3)


def _over_rows(function: Callable[[PyTree], Any], rows: PyTree) -> dict[str, Any]:
    mapped = functools.partial(jax.lax.map, function, batch_size=CHECK_BATCH)
    found: dict[str, Any] = jax.jit(mapped)(rows)
    return found


def _expected(support: Any) -> str:
    """Says what a support holds. Its bounds may come from the data, so they are not shown."""
    name = type(sites.base_support(support)).__name__
    return _EXPECTED.get(name, name.lstrip("_"))
