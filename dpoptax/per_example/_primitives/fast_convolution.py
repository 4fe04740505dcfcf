"""Convolutions that are fast inside the loops and branches of a CPU's program.

XLA on a CPU has fast convolutions for one layout only: examples first and channels last. It changes
the layout of others, but not inside loops and branches, where they take up to 36 times as long
(jaxlib 0.10.2). The derivatives of a convolution have other layouts than the convolution itself. So
here all of them are written in that one layout.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from dpoptax import _jax_compat
from dpoptax.per_example._devices import current_device


def convolve(params: Mapping[str, Any], lhs: Array, rhs: Array) -> Array:
    """Runs a convolution with the parameters of its equation."""
    # Other devices choose their own layouts.
    if not current_device().is_cpu:
        return _bind(params, lhs, rhs)
    specs = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in (lhs, rhs)]

    def plain(lhs: Array, rhs: Array) -> Array:
        return _in_one_layout(params, lhs, rhs)

    def of_lhs(rhs: Array, cotangent: Array) -> Array:
        """JAX's own derivative, as is `of_rhs`."""
        linear = jax.linear_transpose(lambda lhs: _bind(params, lhs, rhs), specs[0])
        return linear(cotangent)[0]

    def of_rhs(lhs: Array, cotangent: Array) -> Array:
        linear = jax.linear_transpose(lambda rhs: _bind(params, lhs, rhs), specs[1])
        return linear(cotangent)[0]

    def forward(lhs: Any, rhs: Any) -> tuple[Array, tuple[Array | None, Array | None]]:
        # Without the operands that no derivative needs: a scan would stack them.
        kept = lhs.value if rhs.perturbed else None, rhs.value if lhs.perturbed else None
        return plain(lhs.value, rhs.value), kept

    def backward(kept: Any, cotangent: Any) -> tuple[Array | None, Array | None]:
        lhs, rhs = kept
        if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
            return None, None
        return (
            None if rhs is None else _with_one_layout(of_lhs, rhs, cotangent),
            None if lhs is None else _with_one_layout(of_rhs, lhs, cotangent),
        )

    run = jax.custom_vjp(plain)
    run.defvjp(forward, backward, symbolic_zeros=True)
    output: Array = run(lhs, rhs)
    return output


def has_slow_convolutions(jaxpr: Any) -> bool:
    """Whether a CPU would compute a convolution of this jaxpr slowly inside a loop."""
    return any(
        eqn.params["dimension_numbers"] != _layout(eqn.invars[0].aval.ndim)
        for eqn in _jax_compat.equations(jaxpr)
        if eqn.primitive is jax.lax.conv_general_dilated_p
    )


def _with_one_layout(function: Callable[..., Array], *values: Array) -> Array:
    """Runs a function of arrays, with its convolutions in the layout that is fast."""
    jaxpr = jax.make_jaxpr(function)(*values).jaxpr
    environment = dict(zip(jaxpr.invars, values, strict=True))
    for eqn in jaxpr.eqns:
        inputs = [
            atom.val if _jax_compat.is_literal(atom) else environment[atom] for atom in eqn.invars
        ]
        if eqn.primitive is jax.lax.conv_general_dilated_p:
            outputs = [_in_one_layout(eqn.params, *inputs)]
        else:
            outputs = _jax_compat.bind(eqn, inputs)
        environment.update(zip(eqn.outvars, outputs, strict=True))
    (output,) = jaxpr.outvars
    return environment[output]


def _in_one_layout(params: Mapping[str, Any], lhs: Array, rhs: Array) -> Array:
    """Turns the operands into the axes `(examples, *image, channels)`, and the output back."""
    numbers = params["dimension_numbers"]
    examples, channels, *image = numbers.lhs_spec
    features, inputs, *window = numbers.rhs_spec
    first, last, *pixels = numbers.out_spec
    output = _bind(
        {**params, "dimension_numbers": _layout(lhs.ndim)},
        jax.lax.transpose(lhs, (examples, *image, channels)),
        jax.lax.transpose(rhs, (*window, inputs, features)),
    )
    return jax.lax.transpose(output, np.argsort((first, *pixels, last)))


def _bind(params: Mapping[str, Any], lhs: Array, rhs: Array) -> Array:
    output: Array = jax.lax.conv_general_dilated_p.bind(lhs, rhs, **params)
    return output


def _layout(ndim: int) -> jax.lax.ConvDimensionNumbers:
    image, window = range(1, ndim - 1), range(ndim - 2)
    of_images = (0, ndim - 1, *image)
    return jax.lax.ConvDimensionNumbers(of_images, (ndim - 1, ndim - 2, *window), of_images)
