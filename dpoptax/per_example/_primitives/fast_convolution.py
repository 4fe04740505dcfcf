"""Convolutions that are fast inside the loops and branches of a CPU's program.

XLA on a CPU has fast convolutions for one layout only: examples first and channels last. It changes
the layout of others, but not inside loops and branches, where they take up to 36 times as long
(jaxlib 0.10.2). The derivatives of a convolution are convolutions in other layouts: JAX exchanges
the axes of inputs and features, or of examples and inputs. So a convolution is written here in the
fast layout, and its tangents in layouts whose transposes, by JAX's own rules, have the fast one:

                              images      kernel      output
    convolution               N..C        ..IO        N..C
    tangent of the images     N..C        ..OI        N..C
      its transpose                       ..IO        N..C    (images: the cotangents, N..C)
    tangent of the kernel     C..N        I..O        ..NC
      its transpose           N..C                    N..C    (kernel: the cotangents, ..IO)
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from dpoptax import _jax_compat
from dpoptax.per_example._devices import current_device


class _Layout(NamedTuple):
    """The place of each axis, as in `jax.lax.ConvDimensionNumbers`.

    Attributes:
        images: of the examples, the channels, and the axes of the image.
        kernel: of the features, the inputs, and the axes of the window.
        output: of the examples, the features, and the axes of the image.
    """

    images: tuple[int, ...]
    kernel: tuple[int, ...]
    output: tuple[int, ...]


def convolve(params: Mapping[str, Any], images: Array, kernel: Array) -> Array:
    """Runs a convolution with the parameters of its equation."""
    # Other devices choose their own layouts.
    if not current_device().is_cpu:
        return _bind(params, images, kernel)
    fast, of_images, of_kernel = _layouts(images.ndim)

    @jax.custom_jvp
    def run(images: Array, kernel: Array) -> Array:
        return _in_layout(fast, params, images, kernel)

    def tangent(primals: Any, tangents: Any) -> tuple[Array, Any]:
        images, kernel = primals
        # No terms of operands without a tangent: a scan would stack what their transposes need.
        # At least one has a tangent, or JAX would not ask.
        terms = [
            _in_layout(layout, params, *operands)
            for layout, operands, varies in (
                (of_images, (tangents[0], kernel), _varies(tangents[0])),
                (of_kernel, (images, tangents[1]), _varies(tangents[1])),
            )
            if varies
        ]
        return run(images, kernel), sum(terms[1:], terms[0])

    run.defjvp(tangent, symbolic_zeros=True)
    output: Array = run(images, kernel)
    return output


def has_slow_convolutions(jaxpr: Any) -> bool:
    """Whether a CPU would compute a convolution of this jaxpr slowly inside a loop."""
    return any(
        tuple(eqn.params["dimension_numbers"]) != _layouts(eqn.invars[0].aval.ndim)[0]
        for eqn in _jax_compat.equations(jaxpr)
        if eqn.primitive is jax.lax.conv_general_dilated_p
    )


def _layouts(ndim: int) -> tuple[_Layout, _Layout, _Layout]:
    """Returns the layouts of the convolution and of its two tangents."""
    last, middle, first = ndim - 1, tuple(range(1, ndim - 1)), tuple(range(ndim - 2))
    usual = (0, last, *middle)
    fast = _Layout(usual, (last, last - 1, *first), usual)
    of_images = _Layout(usual, (last - 1, last, *first), usual)
    of_kernel = _Layout((last, 0, *middle), (last, 0, *middle), (last - 1, last, *first))
    return fast, of_images, of_kernel


def _in_layout(layout: _Layout, params: Mapping[str, Any], images: Array, kernel: Array) -> Array:
    """Moves the axes of the operands to a layout, convolves, and moves those of the output back."""
    given = _Layout(*params["dimension_numbers"])
    output = _bind(
        {**params, "dimension_numbers": jax.lax.ConvDimensionNumbers(*layout)},
        _moved(images, given.images, layout.images),
        _moved(kernel, given.kernel, layout.kernel),
    )
    return _moved(output, layout.output, given.output)


def _moved(array: Array, places: tuple[int, ...], to: tuple[int, ...]) -> Array:
    """Moves the axis at `places[i]` to `to[i]`."""
    return jax.lax.transpose(array, tuple(places[i] for i in np.argsort(to)))


def _varies(tangent: Any) -> bool:
    return not isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def _bind(params: Mapping[str, Any], images: Array, kernel: Array) -> Array:
    output: Array = jax.lax.conv_general_dilated_p.bind(images, kernel, **params)
    return output
