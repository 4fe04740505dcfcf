"""An example that is not data, on which a guide is set up.

An autoguide searches for initial values at which the density is finite. So what the model observes
must lie in the support of its distribution: whole numbers for counts, a point of the simplex for
shares. The arguments that give such observations are found through the model, by one step of
Newton's method for an observation that is a column of an argument, or a scaled one.
"""

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jaxtyping import Array, PRNGKeyArray

from dpoptax._pytree import PyTree
from dpoptax.vi.numpyro import _sites as sites

# One round is enough for a fixed support. A support that depends on other columns needs a second.
_ROUNDS = 3
# Floats and whole numbers to start from. An exposure of 0 or a total count of 0.5 is invalid.
_NUMBERS = ((0.5, 0), (0.5, 1), (1.0, 0), (1.0, 1))


def stand_in_examples(program: sites.Program, args: PyTree, key: PRNGKeyArray) -> Iterator[PyTree]:
    """Yields examples with the shapes and dtypes of `args`; it reads none of their values.

    Args:
        program: the model.
        args: batches.
        key: for the latents that the model draws.

    Yields:
        Arrays without the leading axis, the best first: 0.5 or 0, else 1, where the supports allow
        it. All distributions have valid parameters there.
    """
    for numbers in _NUMBERS:
        example = _in_support(program, neutral_example(args, *numbers), key)
        if _is_valid(program, example, key):
            yield example


def neutral_example(args: PyTree, number: float = 0.5, whole: int = 0) -> PyTree:
    """Returns one example of 0.5, or 0 for whole numbers: in the support of most likelihoods."""
    return jax.tree.map(functools.partial(_neutral, number=number, whole=whole), args)


def _in_support(program: sites.Program, example: PyTree, key: PRNGKeyArray) -> PyTree:
    """Returns the example with its observations moved into their supports."""
    with numpyro.validation_enabled(False):
        for _ in range(_ROUNDS):
            misfits = sites_outside_support(program, example, key)
            if not misfits:
                break
            example = _moved(program, example, key, misfits)
    return example


def _is_valid(program: sites.Program, example: PyTree, key: PRNGKeyArray) -> bool:
    """Whether the example gives all distributions valid parameters, by NumPyro's own checks."""
    with warnings.catch_warnings(), numpyro.validation_enabled(True):
        warnings.simplefilter("ignore")
        # NumPyro only warns about this, in a model that evaluates a density by itself.
        warnings.filterwarnings("error", "Out-of-support values", UserWarning)
        try:
            program.model_trace({}, sites.repeat_example(example), key)
        except (UserWarning, ValueError):
            return False
    return True


def sites_outside_support(
    program: sites.Program, example: PyTree, key: PRNGKeyArray
) -> dict[str, Array]:
    """Returns, by name of an observed site outside its support, a value inside."""
    trace = program.model_trace({}, sites.repeat_example(example), key)
    targets = {}
    for name, site in sites.sample_sites(trace):
        if not sites.has_support(site) or bool(jnp.all(sites.in_support(site))):
            continue
        try:
            target = site["fn"].support.feasible_like(jnp.asarray(site["value"]))
        except NotImplementedError:
            continue  # NumPyro knows no such value: the autoguide says whether it needs one
        targets[name] = jnp.broadcast_to(target, jnp.shape(site["value"]))
    return targets


def _moved(
    program: sites.Program, example: PyTree, key: PRNGKeyArray, targets: dict[str, Array]
) -> PyTree:
    """Returns the example whose observations are the targets, where they are columns of it."""
    leaves, treedef = jax.tree.flatten(example)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def observations(leaves: list[Array]) -> dict[str, Array]:
        batch = sites.repeat_example(jax.tree.unflatten(treedef, leaves))
        trace = program.model_trace({}, batch, key)
        return {name: jnp.asarray(trace[name]["value"], jnp.float32) for name in targets}

    def of_floats(floats: list[Array]) -> dict[str, Array]:
        chosen = iter(floats)
        return observations(
            [next(chosen) if flag else leaf for leaf, flag in zip(leaves, is_float, strict=True)]
        )

    floats = [leaf for leaf, flag in zip(leaves, is_float, strict=True) if flag]
    now, pull_back = jax.vjp(of_floats, floats)
    # The Jacobian of a column has one entry in each row, so its square inverts it.
    (steps,) = pull_back({name: targets[name] - value for name, value in now.items()})
    (slopes,) = pull_back(jax.tree.map(jnp.ones_like, now))
    moved = iter(
        [
            leaf + jnp.where(slope == 0, 0, step / jnp.where(slope == 0, 1, slope) ** 2)
            for leaf, step, slope in zip(floats, steps, slopes, strict=True)
        ]
    )
    found = [next(moved) if flag else leaf for leaf, flag in zip(leaves, is_float, strict=True)]
    for index, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            found[index] = _moved_integers(observations, leaves, index, now, targets)
    return jax.tree.unflatten(treedef, found)


def _moved_integers(
    observations: Any,
    leaves: list[Array],
    index: int,
    now: dict[str, Array],
    targets: dict[str, Array],
) -> Array:
    """Returns whole numbers that give the targets, if an observation has as many entries."""
    leaf = leaves[index]
    more = observations([*leaves[:index], leaf + 1, *leaves[index + 1 :]])
    for name, target in targets.items():
        slope = more[name] - now[name]
        if slope.size == leaf.size and bool(jnp.all(slope != 0)):
            step = jnp.round((target - now[name]) / slope).astype(leaf.dtype)
            return leaf + step.reshape(leaf.shape)
    return leaf


def _neutral(leaf: Any, number: float, whole: int) -> Array:
    dtype = jnp.result_type(leaf)
    value = number if jnp.issubdtype(dtype, jnp.inexact) else whole
    return jnp.full(jnp.shape(leaf)[1:], value, dtype)
