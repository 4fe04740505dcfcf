"""Convolutions: the gradient of an example is P'G, a product of patches P and cotangents G.

The patches (T, window x channels) are shifted views of the padded input, so the rules for matrix
products hold:

    patches:    ||P'G||^2 from P'G itself
    pixel Gram: ||P'G||^2 = <P P', G G'>, where P P' is the sum, over the window, of shifted views
                of the inner products of pixels: no patches are needed

XLA's own per-example gradient is a convolution with as many groups as there are examples, which is
slow. Patches of a few examples at a time stay in the cache of a CPU.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax.per_example._norm_rules import convolution_layout as layout
from dpoptax.per_example._norm_rules import cost_model
from dpoptax.per_example._norm_rules.base import NormRule
from dpoptax.per_example._norm_rules.chunking import map_chunks
from dpoptax.per_example._norm_rules.factors import HIGHEST, Factors
from dpoptax.per_example._norm_rules.matmul import gram_squared_norms
from dpoptax.per_example._norm_rules.rounding import round_up, sum_of_squares
from dpoptax.per_example._tracing.site import Site


@dataclasses.dataclass(frozen=True, eq=False)
class ConvolutionRule(NormRule):
    """What the two rules for convolutions share.

    Attributes:
        sizes: static sizes of the one site.
    """

    sizes: layout.Sizes

    @classmethod
    def matches(cls, sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> "ConvolutionRule | None":
        """Accepts a leaf with one use only, a convolution outside of scans."""
        if len(sites) != 1 or sites[0].primitive is not jax.lax.conv_general_dilated_p:
            return None
        (site,) = sites
        if site.scans or site.params["batch_group_count"] != 1 or not site.preserves_norms(spec):
            return None
        sizes = layout.sizes_of(site)
        return cls((site,), spec, sizes) if cls.applies(site, sizes) else None

    @staticmethod
    def applies(site: Site, sizes: layout.Sizes) -> bool:
        """Whether the rule serves a convolution of these sizes."""
        del site, sizes
        return True

    def gradients(self, factors: Sequence[Factors]) -> Float[Array, "batch ..."]:
        """See `NormRule.gradients`."""
        (site,) = self.sites

        def of_chunk(chunk: Factors) -> Array:
            return jax.vmap(lambda product: layout.product_to_leaf(site, product, self.spec))(
                _products(site, chunk)
            )

        return map_chunks(of_chunk, factors[0], self.sizes.num_floats)

    def weighted_sum(self, factors: Sequence[Factors]) -> Float[Array, "..."]:
        """See `NormRule.weighted_sum`."""
        (site,), (factor,) = self.sites, factors
        pair = layout.patches(site, factor), layout.cotangents(site, factor)
        return layout.product_to_leaf(site, _contract("bgkt,btgn->gkn", *pair), self.spec)

    @property
    def num_floats(self) -> int:
        """See `NormRule.num_floats`."""
        return self.sizes.num_floats


@dataclasses.dataclass(frozen=True, eq=False)
class ConvolutionPatches(ConvolutionRule):
    """Multiplies patches and cotangents, a few examples at a time, squares and drops."""

    name = "patches"

    @property
    def cost(self) -> float:
        """See `NormRule.cost`: the product, and copying the patches."""
        copied = cost_model.constants(self.sites).copy * self.sizes.window * self.sizes.channels
        return self.sizes.outputs * (self.sizes.kernel + copied)

    def squared_norms(self, factors: Sequence[Factors]) -> Float[Array, " batch"]:
        """See `NormRule.squared_norms`."""
        (site,) = self.sites

        def norms(chunk: Factors) -> Array:
            products = jnp.square(_products(site, chunk))
            # A patch holds `window` pixels, so its squared norm is at most `window` times that of
            # the largest pixel.
            largest = self.sizes.window * _largest_pixel(site, chunk)
            sizes = largest * sum_of_squares(layout.cotangents(site, chunk), (1, 2, 3))
            squares = jnp.sum(products, axis=tuple(range(1, products.ndim)))
            return round_up(squares, sizes, self.sizes.outputs)

        return map_chunks(norms, factors[0], self.sizes.num_floats)


@dataclasses.dataclass(frozen=True, eq=False)
class ConvolutionPixelGram(ConvolutionRule):
    """Multiplies the Gram matrices of patches and cotangents, the former without patches."""

    name = "pixel Gram"

    @staticmethod
    def applies(site: Site, sizes: layout.Sizes) -> bool:
        """Accepts one group of features, the usual convolution."""
        del site
        return sizes.groups == 1

    @property
    def cost(self) -> float:
        """See `NormRule.cost`: two Gram matrices, and adding up the shifted views of one."""
        sizes = self.sizes
        shifted = cost_model.constants(self.sites).copy * sizes.window
        return sizes.pixels**2 * sizes.channels + sizes.outputs**2 * (sizes.features + shifted)

    def squared_norms(self, factors: Sequence[Factors]) -> Float[Array, " batch"]:
        """See `NormRule.squared_norms`."""
        (site,) = self.sites

        def norms(chunk: Factors) -> Array:
            g = layout.cotangents(site, chunk)[:, :, 0]
            outputs = jnp.einsum("btn,bsn->bts", g, g, precision=HIGHEST)
            return gram_squared_norms(_patch_gram(site, chunk).reshape(outputs.shape), outputs)

        grams = 2 * self.sizes.outputs**2 + self.sizes.pixels**2
        return map_chunks(norms, factors[0], grams + self.sizes.num_floats // self.sizes.window)


def _patch_gram(site: Site, chunk: Factors) -> Float[Array, "batch ..."]:
    """The inner products of all pairs of patches, `(batch, *outputs, *outputs)`.

    Two patches at outputs t and s have the inner product sum_o <x[t + o], x[s + o]>, over the
    offsets o in the window: a sum along the diagonals of the inner products of pixels. The patches
    may be of two frames, such as two views of one example.
    """
    pixels = layout.channels_last(site, chunk)  # batch, frames, *image, channels
    batch, *grid, channels = pixels.shape
    pixels = pixels.reshape(batch, math.prod(grid), channels)
    gram = jnp.einsum("bpc,bqc->bpq", pixels, pixels, precision=HIGHEST)
    gram = gram.reshape(batch, *grid, *grid)
    window = layout.window_of(site)
    # The axes of the image, in both copies of the pixels.
    own_axes = range(2, 2 + len(window))
    other_axes = range(3 + len(window), 3 + 2 * len(window))
    gram = layout.pad_image(site, gram, (*own_axes, *other_axes))
    # The window is a product of ranges, so its offsets are added along one axis after the other;
    # both copies of that axis are shifted by the same offset.
    for image_axis, size in enumerate(window):
        own, other = own_axes[image_axis], other_axes[image_axis]
        views = [
            layout.shift(site, layout.shift(site, gram, own, image_axis, i), other, image_axis, i)
            for i in range(size)
        ]
        gram = functools.reduce(jnp.add, views)
    return gram


def _products(site: Site, chunk: Factors) -> Float[Array, "batch groups k n"]:
    """P'G of every example; K is window by channels."""
    return _contract("bgkt,btgn->bgkn", layout.patches(site, chunk), layout.cotangents(site, chunk))


def _contract(formula: str, patches: Array, cotangents: Array) -> Array:
    if patches.shape[1] > 1:
        return jnp.einsum(formula, patches, cotangents, precision=HIGHEST)
    # One group is the usual case: without its axis, XLA sees a plain batched product.
    pair = patches[:, 0], cotangents[:, :, 0]
    product = jnp.einsum(formula.replace("g", ""), *pair, precision=HIGHEST)
    return jnp.expand_dims(product, -3)


def _largest_pixel(site: Site, chunk: Factors) -> Float[Array, " batch"]:
    """The largest squared norm of a pixel in every example."""
    pixels = layout.channels_last(site, chunk)
    squares = sum_of_squares(pixels, (pixels.ndim - 1,))
    return jnp.max(squares, axis=tuple(range(1, squares.ndim)), initial=0.0)
