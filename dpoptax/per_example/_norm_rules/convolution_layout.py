"""Patches, pixels and cotangents of a convolution as plain matrices, and gradients back.

A convolution is a product of matrices: row t of the patches holds the part of the input that the
window sees at output t. The sizes, per example and with G feature groups:

    patches     (G, window x channels / G, T)
    cotangents  (T, G, features / G)
    product     (G, window x channels / G, features / G): the gradient of the kernel
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax._precision import wide_dtype
from dpoptax.per_example._norm_rules import cost_model
from dpoptax.per_example._norm_rules.factors import Factors, to_leaf
from dpoptax.per_example._tracing.site import Site


class Sizes(NamedTuple):
    """The static sizes of a convolution.

    Attributes:
        groups: of features.
        window: positions in the window of the kernel.
        kernel: numbers in the kernel.
        channels: of the input.
        pixels: of the input, all frames together.
        features: channels of the output.
        outputs: pixels of the output, T.
    """

    groups: int
    window: int
    kernel: int
    channels: int
    pixels: int
    features: int
    outputs: int

    @property
    def num_floats(self) -> int:
        """What one example holds: its patches, its gradient and its cotangents."""
        patches = self.outputs * self.window * self.channels
        return patches + self.kernel + self.outputs * self.features


def sizes_of(site: Site) -> Sizes:
    """The static sizes of a site."""
    numbers, groups = site.params["dimension_numbers"], site.params["feature_group_count"]
    features = site.output.shape[numbers.out_spec[1]]
    channels = site.operands[0].shape[numbers.lhs_spec[1]]
    kernel = math.prod(site.parameter.shape)
    return Sizes(
        groups=groups,
        window=kernel * groups // (channels * features),
        kernel=kernel,
        channels=channels,
        pixels=math.prod(site.operands[0].shape) // channels,
        features=features,
        outputs=math.prod(site.output.shape) // features,
    )


def window_of(site: Site) -> list[int]:
    """The sides of the window, one per axis of the image."""
    return [site.parameter.shape[axis] for axis in site.params["dimension_numbers"].rhs_spec[2:]]


def channels_last(site: Site, factors: Factors) -> Array:
    """The input, `(batch, frames, *image, channels)`."""
    frames, channels, *image = site.params["dimension_numbers"].lhs_spec
    order = (frames, *image, channels)
    return _wide(site, factors.operands[0]).transpose(0, *(1 + axis for axis in order))


def cotangents(site: Site, factors: Factors) -> Float[Array, "batch t groups n"]:
    """The cotangents of the output, by pixel and group."""
    frames, features, *image = site.params["dimension_numbers"].out_spec
    order = (frames, *image, features)
    g = _wide(site, factors.cotangent).transpose(0, *(1 + axis for axis in order))
    groups = site.params["feature_group_count"]
    return g.reshape(len(g), math.prod(g.shape[1:-1]), groups, g.shape[-1] // groups)


def _wide(site: Site, leaf: Array) -> Array:
    return leaf.astype(wide_dtype(site.parameter.dtype))


def patches(site: Site, factors: Factors) -> Float[Array, "batch groups k t"]:
    """What the window sees at every output, built along one axis of the image after the other."""
    x = channels_last(site, factors)
    window, groups = window_of(site), site.params["feature_group_count"]
    x = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    # With the outputs last, XLA on a CPU copies long runs and its products are fastest.
    x = jnp.moveaxis(x, (-2, -1), (1, 2))  # batch, groups, channels, frames, *image
    x = pad_image(site, x, range(x.ndim - len(window), x.ndim))
    # Each step adds one axis of the window at position 2 and turns one axis of the image into
    # outputs. In reverse, so that the first axis of the window ends up first.
    for image_axis in reversed(range(len(window))):
        x = _views(site, x, image_axis)
    channels, outputs = x.shape[2 + len(window)], x.shape[3 + len(window) :]
    return x.reshape(len(x), groups, math.prod(window) * channels, math.prod(outputs))


def pad_image(site: Site, x: Array, axes: Iterable[int]) -> Array:
    """Pads and dilates `axes`: all axes of the image, once or several times in a row."""
    config = [(0, 0, 0)] * x.ndim
    padding, dilation = site.params["padding"], site.params["lhs_dilation"]
    for number, axis in enumerate(axes):
        low, high = padding[number % len(padding)]
        config[axis] = (low, high, dilation[number % len(padding)] - 1)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), config)


def shift(site: Site, x: Array, axis: int, image_axis: int, offset: int) -> Array:
    """What position `offset` of the window sees along `image_axis`, which is `axis` of `x`."""
    length = _output_size(site, image_axis)
    start = offset * site.params["rhs_dilation"][image_axis]
    stride = site.params["window_strides"][image_axis]
    return jax.lax.slice_in_dim(x, start, start + (length - 1) * stride + 1, stride, axis)


def product_to_leaf(
    site: Site, product: Float[Array, "groups k n"], spec: jax.ShapeDtypeStruct
) -> Array:
    """Brings the product of patches and cotangents to the axes of the kernel, and to the leaf."""
    features_axis, channels_axis, *window_axes = site.params["dimension_numbers"].rhs_spec
    groups, _, features = product.shape
    window = window_of(site)
    product = product.reshape(groups, *window, -1, features)
    # The kernel has no axis of groups: it lists the features of the first group, then those of the
    # second, and so on, and has the channels of one group only.
    product = jnp.moveaxis(product, 0, -2)  # *window, channels, groups, features of a group
    product = product.reshape(*window, -1, groups * features)
    axes = (*window_axes, channels_axis, features_axis)
    return to_leaf(site, jnp.moveaxis(product, range(product.ndim), axes), spec)


def _views(site: Site, x: Array, image_axis: int) -> Array:
    """What every position of the window sees along `image_axis`, on a new axis 2."""
    axis = x.ndim - len(window_of(site)) + image_axis
    size = window_of(site)[image_axis]
    if size <= cost_model.MAX_SLICED_WINDOW:
        return jnp.stack([shift(site, x, axis, image_axis, i) for i in range(size)], 2)
    starts = jnp.arange(_output_size(site, image_axis)) * site.params["window_strides"][image_axis]
    offsets = jnp.arange(size) * site.params["rhs_dilation"][image_axis]
    return jnp.moveaxis(jnp.take(x, offsets[:, None] + starts, axis), axis, 2)


def _output_size(site: Site, image_axis: int) -> int:
    return site.output.shape[site.params["dimension_numbers"].out_spec[2 + image_axis]]
