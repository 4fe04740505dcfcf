"""Convolutions: the gradient of an example is a product of patches and cotangents.

Patches are the kernel's shifted views of the padded input, (T, window, channels); with them a
convolution is a matrix product, and the rules for products hold. XLA's own per-example gradient,
a convolution in as many groups as there are examples, is slow; a few examples at a time, whose
patches stay in the cache, are not.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax.per_example.rules.direct import chunk_size
from dpoptax.per_example.rules.factors import Factors
from dpoptax.per_example.rules.matmul import HIGHEST
from dpoptax.per_example.tracing import Site
from dpoptax.precision import widen


def candidates(
    sites: Sequence[Site], spec: jax.ShapeDtypeStruct
) -> Iterator[tuple[str, Callable[[Sequence[Factors]], Array], float, float]]:
    """Yields the rule for leaves whose only use is one convolution outside of scans."""
    if len(sites) != 1 or sites[0].primitive.name != "conv_general_dilated":
        return
    (site,) = sites
    if site.levels or site.params["batch_group_count"] != 1 or not site.isometric(spec):
        return
    _, features, *_ = _by(site.params["dimension_numbers"].out_spec, site.output.shape)
    outputs = math.prod(site.output.shape)
    kernel = math.prod(site.weight.shape)
    patches = outputs // features * kernel // features * site.params["feature_group_count"]

    def squared_norms(factors: Sequence[Factors]) -> Float[Array, " batch"]:
        def one(factor: Factors) -> Array:
            return jnp.sum(jnp.square(_gradient(site, factor)))

        return jax.lax.map(one, factors[0], batch_size=chunk_size(patches + kernel))

    yield "patches", squared_norms, outputs * kernel / features, patches + kernel


def _gradient(site: Site, factor: Factors) -> Array:
    """The gradient of one example, `(groups, window, channels, features)`."""
    (operand,), cotangent = factor
    numbers, groups = site.params["dimension_numbers"], site.params["feature_group_count"]
    x = jnp.transpose(widen(operand), _channels_last(numbers.lhs_spec))
    g = jnp.transpose(widen(cotangent), _channels_last(numbers.out_spec))
    window = _by(numbers.rhs_spec, site.weight.shape)[2:]
    x = _pad(x, site.params["padding"], site.params["lhs_dilation"])
    strides, dilation = site.params["window_strides"], site.params["rhs_dilation"]
    views = []
    for offset in itertools.product(*map(range, window)):
        start = [o * d for o, d in zip(offset, dilation, strict=True)]
        limit = [
            s + (n - 1) * stride + 1
            for s, n, stride in zip(start, g.shape[1:-1], strides, strict=True)
        ]
        views.append(
            jax.lax.slice(
                x, (0, *start, 0), (x.shape[0], *limit, x.shape[-1]), (1, *strides, 1)
            ).reshape(-1, groups, x.shape[-1] // groups)
        )
    patches = jnp.concatenate(views, axis=2)  # (T, groups, window * channels)
    g = g.reshape(patches.shape[0], groups, -1)
    return jnp.einsum("tgc,tgf->gcf", patches, g, precision=HIGHEST)


def _pad(x: Array, padding: Sequence[tuple[int, int]], dilation: Sequence[int]) -> Array:
    config = [(0, 0, 0), *((lo, hi, d - 1) for (lo, hi), d in zip(padding, dilation, strict=True))]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [*config, (0, 0, 0)])


def _channels_last(spec: Sequence[int]) -> tuple[int, ...]:
    batch, channels, *spatial = spec
    return (batch, *spatial, channels)


def _by(spec: Sequence[int], shape: Sequence[int]) -> list[int]:
    return [shape[axis] for axis in spec]
