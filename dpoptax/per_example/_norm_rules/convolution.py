"""Convolutions: the gradient of an example is a product of patches and cotangents.

Patches are the kernel's shifted views of the padded input, (T, window, channels); with them a
convolution is a matrix product, P'G, and the rules for products hold:

    patches:    ||P'G||^2 by forming P'G
    pixel Gram: ||P'G||^2 = <P P', G G'>, where P P' is a sum, over the window, of shifted views
                of the inner products of pixels: no patches at all

XLA's own per-example gradient, a convolution in as many groups as there are examples, is slow; a
few examples at a time, whose patches stay in the cache, are not. On a CPU that holds for the sum
over the batch too.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax._precision import widen
from dpoptax.per_example._norm_rules import gram, materialize
from dpoptax.per_example._norm_rules.base import NormRule
from dpoptax.per_example._norm_rules.chunking import map_chunks, on_cpu, sum_chunks
from dpoptax.per_example._norm_rules.factors import HIGHEST, Factors, to_leaf
from dpoptax.per_example._norm_rules.rounding import rounded_up, sum_of_squares
from dpoptax.per_example._tracing.site import Site

# What moving a number costs, in multiplications of a large product.
MOVE = 16.0
# On a CPU the sum over images with more outputs is faster patch by patch than XLA's own.
LARGE = 64
# A longer side of a window is looked up rather than sliced.
LONG = 16


def candidates(sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> Iterator[NormRule]:
    """Yields the two ways for leaves whose only use is one convolution outside of scans."""
    if not _understands(sites, spec):
        return
    (site,) = sites
    numbers, groups = site.params["dimension_numbers"], site.params["feature_group_count"]
    features = site.output.shape[numbers.out_spec[1]]
    outputs = math.prod(site.output.shape) // features
    kernel = math.prod(site.parameter.shape)
    channels = site.operands[0].shape[numbers.lhs_spec[1]]
    pixels = math.prod(site.operands[0].shape) // channels
    window = kernel * groups // (channels * features)
    held = outputs * window * channels + kernel + outputs * features

    def squared_norms(chunk: Factors) -> Array:
        products = jnp.square(_products(site, chunk))
        sizes = window * _largest_pixel(site, chunk) * _squares(chunk.cotangent)
        return rounded_up(jnp.sum(products, axis=tuple(range(1, products.ndim))), sizes, outputs)

    def gradients(factors: Sequence[Factors]) -> Float[Array, "batch ..."]:
        def form(chunk: Factors) -> Array:
            return jax.vmap(lambda product: _to_leaf(site, product, spec))(_products(site, chunk))

        return map_chunks(form, factors[0], held)

    def total(factors: Sequence[Factors]) -> Float[Array, "..."]:
        if outputs < LARGE or not on_cpu():
            return materialize.total(sites, spec, factors)
        product = sum_chunks(functools.partial(_product_of_all, site), factors[0], held)
        return _to_leaf(site, product, spec)

    yield NormRule(
        "patches",
        lambda factors: map_chunks(squared_norms, factors[0], held),
        gradients,
        total,
        outputs * (kernel + MOVE * window * channels),
        held,
    )
    if groups == 1 and site.operands[0].shape[numbers.lhs_spec[0]] == 1:
        grams = 2 * outputs**2 + pixels**2

        def gram_norms(chunk: Factors) -> Array:
            return _gram_squared_norms(site, chunk)

        yield NormRule(
            "pixel Gram",
            lambda factors: map_chunks(gram_norms, factors[0], grams + held // window),
            gradients,
            total,
            pixels**2 * channels + outputs**2 * (features + MOVE * window),
            grams,
        )


def _understands(sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> bool:
    if len(sites) != 1 or sites[0].primitive is not jax.lax.conv_general_dilated_p:
        return False
    (site,) = sites
    return not site.scans and site.params["batch_group_count"] == 1 and site.preserves_norms(spec)


def _products(site: Site, chunk: Factors) -> Float[Array, "batch groups k n"]:
    """P'G of every example; K is window by channels."""
    return _contract("bgkt,btgn->bgkn", _patches(site, chunk), _cotangents(site, chunk))


def _largest_pixel(site: Site, chunk: Factors) -> Float[Array, " batch"]:
    """The largest squared norm of a pixel: a patch has at most as many times it as a window."""
    pixels = _channels_last(site, chunk)
    squares = sum_of_squares(pixels, (pixels.ndim - 1,))
    return jnp.max(squares, axis=tuple(range(1, squares.ndim)), initial=0.0)


def _squares(leaf: Array) -> Float[Array, " batch"]:
    return sum_of_squares(widen(leaf), tuple(range(1, leaf.ndim)))


def _product_of_all(site: Site, chunk: Factors) -> Float[Array, "groups k n"]:
    return _contract("bgkt,btgn->gkn", _patches(site, chunk), _cotangents(site, chunk))


def _contract(formula: str, patches: Array, cotangents: Array) -> Array:
    if patches.shape[1] > 1:
        return jnp.einsum(formula, patches, cotangents, precision=HIGHEST)
    pair = patches[:, 0], cotangents[:, :, 0]
    product = jnp.einsum(formula.replace("g", ""), *pair, precision=HIGHEST)
    return jnp.expand_dims(product, -3)


def _gram_squared_norms(site: Site, chunk: Factors) -> Float[Array, " batch"]:
    pixels = _channels_last(site, chunk)[:, 0]  # batch, *image, channels
    image = pixels.shape[1:-1]
    pixels = pixels.reshape(len(pixels), math.prod(image), pixels.shape[-1])
    inputs = jnp.einsum("bpc,bqc->bpq", pixels, pixels, precision=HIGHEST)
    dimensions = len(image)
    inputs = _pad(site, inputs.reshape(len(pixels), *image, *image), range(1, 1 + 2 * dimensions))
    for axis, size in enumerate(_window(site)):
        own, other = 1 + axis, 1 + dimensions + axis
        views = [
            _shift(site, _shift(site, inputs, own, axis, offset), other, axis, offset)
            for offset in range(size)
        ]
        inputs = functools.reduce(jnp.add, views)
    cotangents = _cotangents(site, chunk)[:, :, 0]
    outputs = jnp.einsum("btn,bsn->bts", cotangents, cotangents, precision=HIGHEST)
    return gram.squared_norms(inputs.reshape(outputs.shape), outputs)


def _patches(site: Site, chunk: Factors) -> Float[Array, "batch groups k t"]:
    """The kernel's views of the input, by one axis of the window after the other."""
    x = _channels_last(site, chunk)
    window, groups = _window(site), site.params["feature_group_count"]
    x = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    # Products are fastest, and copies longest, with the outputs last.
    x = jnp.moveaxis(x, (-2, -1), (1, 2))  # batch, groups, channels, frames, *image
    image = range(x.ndim - len(window), x.ndim)
    x = _pad(site, x, image)
    for axis in reversed(range(len(window))):
        x = _views(site, x, axis)
    channels, outputs = x.shape[2 + len(window)], x.shape[3 + len(window) :]
    return x.reshape(len(x), groups, math.prod(window) * channels, math.prod(outputs))


def _views(site: Site, x: Array, dimension: int) -> Array:
    """What every place of the window sees along a dimension of the image, on a new axis 2."""
    axis = x.ndim - len(_window(site)) + dimension
    size = _window(site)[dimension]
    if size <= LONG:
        return jnp.stack([_shift(site, x, axis, dimension, o) for o in range(size)], 2)
    starts = jnp.arange(_outputs(site, dimension)) * site.params["window_strides"][dimension]
    offsets = jnp.arange(size) * site.params["rhs_dilation"][dimension]
    return jnp.moveaxis(jnp.take(x, offsets[:, None] + starts, axis), axis, 2)


def _cotangents(site: Site, chunk: Factors) -> Float[Array, "batch t groups n"]:
    batch, features, *spatial = site.params["dimension_numbers"].out_spec
    g = widen(chunk.cotangent).transpose(0, *(1 + axis for axis in (batch, *spatial, features)))
    groups = site.params["feature_group_count"]
    return g.reshape(len(g), math.prod(g.shape[1:-1]), groups, g.shape[-1] // groups)


def _channels_last(site: Site, chunk: Factors) -> Array:
    """The input, `(batch, frames, *image, channels)`."""
    batch, channels, *spatial = site.params["dimension_numbers"].lhs_spec
    order = (batch, *spatial, channels)
    return widen(chunk.operands[0]).transpose(0, *(1 + axis for axis in order))


def _window(site: Site) -> list[int]:
    return [site.parameter.shape[axis] for axis in site.params["dimension_numbers"].rhs_spec[2:]]


def _pad(site: Site, x: Array, axes: Sequence[int]) -> Array:
    """Pads and dilates the axes of an image, which may stand more than once in a row."""
    config = [(0, 0, 0)] * x.ndim
    padding, dilation = site.params["padding"], site.params["lhs_dilation"]
    for number, axis in enumerate(axes):
        low, high = padding[number % len(padding)]
        config[axis] = (low, high, dilation[number % len(padding)] - 1)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), config)


def _shift(site: Site, x: Array, axis: int, dimension: int, offset: int) -> Array:
    """What one place of the window sees along a dimension of the image, output by output."""
    length = _outputs(site, dimension)
    start = offset * site.params["rhs_dilation"][dimension]
    stride = site.params["window_strides"][dimension]
    return jax.lax.slice_in_dim(x, start, start + (length - 1) * stride + 1, stride, axis)


def _outputs(site: Site, dimension: int) -> int:
    return site.output.shape[site.params["dimension_numbers"].out_spec[2 + dimension]]


def _to_leaf(site: Site, product: Float[Array, "groups k n"], spec: jax.ShapeDtypeStruct) -> Array:
    """Brings P'G to the axes of the kernel, and to the leaf."""
    out, into, *spatial = site.params["dimension_numbers"].rhs_spec
    groups, _, features = product.shape
    window = _window(site)
    product = product.reshape(groups, *window, -1, features)
    product = jnp.moveaxis(product, 0, -2)  # window, channels, groups, features of a group
    product = product.reshape(*window, -1, groups * features)
    return to_leaf(site, jnp.moveaxis(product, range(product.ndim), (*spatial, into, out)), spec)
