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

from dpoptax.per_example.rules.direct import in_chunks
from dpoptax.per_example.rules.factors import Factors
from dpoptax.per_example.rules.matmul import HIGHEST
from dpoptax.per_example.tracing import Site
from dpoptax.precision import widen


def candidates(
    sites: Sequence[Site], spec: jax.ShapeDtypeStruct
) -> Iterator[tuple[str, Callable[[Sequence[Factors]], Array], float, float]]:
    """Yields the rule for leaves whose only use is one convolution outside of scans."""
    if not understands(sites, spec):
        return
    (site,) = sites
    features = _features(site)
    outputs = math.prod(site.output.shape)
    kernel = math.prod(site.weight.shape)

    def squared_norms(factors: Sequence[Factors]) -> Float[Array, " batch"]:
        def one(factor: Factors) -> Array:
            return jnp.sum(jnp.square(_gradient(site, factor)))

        return in_chunks(one, factors[0], _numbers(site))

    yield "patches", squared_norms, outputs * kernel / features, _numbers(site)


def understands(sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> bool:
    """Whether the one use of a leaf is a convolution outside of scans."""
    if len(sites) != 1 or sites[0].primitive.name != "conv_general_dilated":
        return False
    (site,) = sites
    return not site.levels and site.params["batch_group_count"] == 1 and site.isometric(spec)


def gradients(site: Site, factors: Sequence[Factors]) -> Float[Array, "batch ..."]:
    """Forms the gradient of every example, in float32 or wider, shaped like the kernel."""
    out, into, *spatial = site.params["dimension_numbers"].rhs_spec
    window = [site.weight.shape[axis] for axis in spatial]

    def one(factor: Factors) -> Array:
        product = _gradient(site, factor)  # groups, window * channels, features / groups
        groups, _, features = product.shape
        product = product.reshape(groups, *window, -1, features)
        product = jnp.moveaxis(product, 0, -2)  # window, channels, groups, features / groups
        product = product.reshape(*window, -1, groups * features)
        return jnp.moveaxis(product, range(product.ndim), (*spatial, into, out))

    return in_chunks(one, factors[0], _numbers(site))


def _numbers(site: Site) -> int:
    """How many numbers the product of one example takes: patches and gradient."""
    features, groups = _features(site), site.params["feature_group_count"]
    kernel, outputs = math.prod(site.weight.shape), math.prod(site.output.shape)
    return outputs // features * kernel // features * groups + kernel + outputs


def _features(site: Site) -> int:
    return site.output.shape[site.params["dimension_numbers"].out_spec[1]]


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
