"""Uses whose gradient is summed where it arises, because their factors are larger than it.

The site of such a use looks like that of a bias: its cotangent is the gradient of the parameter.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpoptax import _jax_compat
from dpoptax._precision import wide_dtype, widen
from dpoptax.per_example._tracing.concatenated import Window
from dpoptax.per_example._tracing.site import EqnPath, Site
from dpoptax.per_example._tracing.taps import batched_like


def tap_of(eqn_path: EqnPath) -> EqnPath:
    """Returns the key of the tap of such a use; no equation has a negative number."""
    return (*eqn_path, -1)


def summed(site: Site, operand: Any, window: Window, eqn_path: EqnPath) -> Site:
    """Returns the site whose cotangent is the gradient of its operand, or of a window of it."""
    dtype = wide_dtype(site.parameter.dtype)
    return dataclasses.replace(
        site,
        primitive=jax.lax.add_p,
        params={},
        operands=(),
        operand_windows=(),
        output=jax.ShapeDtypeStruct(site.parameter.shape, dtype),
        output_window=window,
        tap=tap_of(eqn_path),
        tap_output=jax.ShapeDtypeStruct(operand.shape, dtype),
        before_sum=site,
    )


def is_larger_than(leaf: Any, site: Site) -> bool:
    """Whether the sums of a use would together be larger than the gradient of its leaf."""
    # The numbers of the leaf may be repeated before the use, or used in every step of a scan.
    size = math.prod(site.parameter.shape) * site.num_runs
    return site.before_sum is not None and size > math.prod(leaf.shape)


def run_summed(eqn: Any, position: int, values: Sequence[Any], zeros: Array) -> Array:
    """Runs a product of two numbers each; the derivative by `zeros` is the parameter's gradient.

    The gradient is summed in float32 or wider.
    """

    def product(other: Any, parameter: Array) -> Array:
        inputs = [parameter, other] if position == 0 else [other, parameter]
        return _jax_compat.bind(eqn, inputs)[0]

    @jax.custom_vjp
    def run(other: Any, parameter: Array, zeros: Array) -> Array:
        return batched_like(product(other, parameter), zeros)

    def forward(other: Any, parameter: Array, zeros: Array) -> Any:
        return run(other, parameter, zeros), (other, parameter)

    def backward(residuals: Any, cotangent: Array) -> Any:
        other, parameter = residuals
        _, pull = jax.vjp(lambda other: product(other, parameter), other)
        wide = [widen(jnp.asarray(leaf)) for leaf in (other, parameter, cotangent)]
        _, pull_wide = jax.vjp(lambda parameter: product(wide[0], parameter), wide[1])
        (gradient,) = pull_wide(wide[2])
        return *pull(cotangent), gradient.astype(parameter.dtype), gradient

    run.defvjp(forward, backward)
    return run(values[1 - position], values[position], zeros)
