"""Finds the sites of a loss, and runs the loss with a tap at each.

A site is an equation that is linear in a parameter leaf, seen through equations that only move
numbers. The gradient of the leaf then has two factors: the other operand of the equation, and the
cotangent of its output. One backward pass gives the cotangents of all sites, so per-example
gradients need never be formed. A leaf with any other use falls back to plain differentiation.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from dpoptax import _jax_compat
from dpoptax.per_example._tracing.early_sums import is_larger_than
from dpoptax.per_example._tracing.interpreter import Walker
from dpoptax.per_example._tracing.site import Site
from dpoptax.per_example._tracing.taps import Saved, Taps
from dpoptax.per_example._tracing.tracked_params import ParamSlice, TrackedParam, value_of
from dpoptax.per_example._tracing.visitors import SiteFinder, TapRunner

_IS_LOSS = "it is the loss itself"


class FoundSites(NamedTuple):
    """Where the parameters of a loss are used.

    Attributes:
        sites: in the order of the program, of leaves that do not fall back.
        fallback_reasons: by number of the leaf, why it needs plain differentiation.
        may_spread_nan: whether `vmap` may spread NaN from one example to others, through
            equations that are no sites.
    """

    sites: tuple[Site, ...]
    fallback_reasons: dict[int, str]
    may_spread_nan: bool


def find_sites(jaxpr: Any, num_constants: int, num_leaves: int) -> FoundSites:
    """Finds the sites of a loss `(*constants, *leaves, *example) -> (scalar, *aux)`.

    It computes nothing.
    """
    finder = SiteFinder()

    def run(*values: Array) -> None:
        _run(jaxpr, values, num_constants, num_leaves, Walker(finder, taps={}))

    variables, _ = _jax_compat.inputs_of(jaxpr)
    # Sites depend on shapes and dtypes only, so the loss runs on abstract values.
    jax.eval_shape(run, *(variable.aval for variable in variables))
    for leaf, variable in enumerate(variables[num_constants : num_constants + num_leaves]):
        if math.prod(variable.aval.shape) == 0:
            finder.fall_back(leaf, "it holds no numbers")
    for site in finder.sites.values():
        if is_larger_than(variables[num_constants + site.leaf].aval, site):
            finder.fall_back(site.leaf, f"repeated and then used by mul at {site.source}")
    # A leaf that no equation uses would have no gradient at all; plain differentiation gives zeros.
    for leaf in set(range(num_leaves)) - {site.leaf for site in finder.sites.values()}:
        finder.fall_back(leaf, "the loss does not depend on it")
    sites = tuple(
        site for _, site in sorted(finder.sites.items()) if site.leaf not in finder.fallback_reasons
    )
    return FoundSites(sites, finder.fallback_reasons, finder.may_spread_nan)


def run_with_taps(
    jaxpr: Any,
    runner: TapRunner,
    constants: Sequence[Any],
    leaves: Sequence[Any],
    example: Sequence[Any],
    taps: Taps,
) -> tuple[tuple[Array, list[Array]], Saved]:
    """Runs a loss; returns it, its auxiliary outputs, and the saved operands of every site.

    The derivative with respect to `taps[site.tap]`, shaped by `tap_spec`, is the cotangent of the
    site's output. The values of the taps are never read, and leaves with sites are constants.
    """
    walker = Walker(runner, taps)
    return _run(jaxpr, [*constants, *leaves, *example], len(constants), len(leaves), walker)


def _run(
    jaxpr: Any, values: Sequence[Any], num_constants: int, num_leaves: int, walker: Walker
) -> tuple[tuple[Any, list[Any]], Saved]:
    inputs = list(values)
    for leaf in range(num_leaves):
        place = num_constants + leaf
        inputs[place] = TrackedParam(inputs[place], (ParamSlice(leaf),))
    outputs, saved = walker.run(jaxpr, inputs, ())
    (loss,) = walker.untrack(outputs[:1], _IS_LOSS)
    # An auxiliary output has no derivative, so a parameter among them needs none.
    return (loss, [value_of(output) for output in outputs[1:]]), saved
