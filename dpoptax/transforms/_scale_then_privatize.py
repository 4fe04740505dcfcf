"""Scale-then-privatize: gradients are scaled before the clip, and scaled back after the noise.

The noise of `privatize` is the same in every coordinate. If some coordinates have much smaller
gradients than others, they vanish in it. With u the inverse scale of each coordinate,

    release = u * privatize(gradient / u)

the noise of a coordinate is proportional to u. The scale comes from earlier releases, or from the
parameters, so it costs no privacy. The clip bounds the scaled gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from dpoptax import _validate
from dpoptax._precision import wide_dtype, widen
from dpoptax._pytree import PyTree
from dpoptax.per_example._stacked import as_per_example_grads
from dpoptax.transforms._private import (
    PrivateOptimizer,
    PrivateTransformation,
    checked_decay,
    require_params,
    stddev_of,
)
from dpoptax.transforms._scaled_grads import ScaledGrads

# Norms of a leaf are scaled after float32 summed their squares, which vanish below 1e-38. With the
# smallest clip bound, 1e-12, the squares at the bound are above 1e-32 before scaling.
_LARGEST_SCALE = 1e4

# From the parameters and the second moments, if any, to the scale.
Scale: TypeAlias = Callable[[PyTree, PyTree], PyTree]


class ScaledState(NamedTuple):
    """The state of the private transformation, and the second moments of what it released.

    The second moments have one number per coordinate or per leaf, in float32 or wider. They are not
    corrected for their start at zero, because the scale depends on their ratios only. They are None
    if the scale comes from the parameters.
    """

    inner: Any
    second_moment: PyTree


def scale_then_privatize(
    optimizer: optax.GradientTransformation,
    *,
    scale: Callable[[PyTree], PyTree] | None = None,
    decay: float = 0.999,
    eps: float = 1.0,
    per_leaf: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Gives coordinates with small gradients less noise: scales before the clip, and back after.

    With v the exponential average of the squares of what was released, and rms the root of the mean
    square over all coordinates,

        u = r / rms(r),   r = sqrt(v) / rms(sqrt(v)) + eps
        release = u * privatize(gradient / u)

    Up to a factor that all coordinates share, this is algorithm 8 of the paper. With that factor
    the noise has the total variance of plain `privatize`, so the clip bound keeps its meaning. With
    a large `eps`, and until the first release, u is 1 and nothing is scaled.

    The clip bounds the scaled gradient of an example, so privacy and epsilon are those of
    `privatize`. A scale per coordinate needs the gradient of each example: it materializes
    `batch * parameters` numbers, or `microbatch_size * parameters` with microbatches, in every
    form. A scale per leaf works in every form at no such cost. Diagnostics of a run show norms
    before scaling.

    Args:
        optimizer: gets the release. Usually one that divides by the second moment, as
            `optax.adam`.
        scale: `scale(params)` in place of the second moments: the factor 1/u before the clip, a
            tree like the parameters of numbers, or of arrays that broadcast to them. It must depend
            on public values only. Factors are kept between 1e-4 and 1e4.
        decay: of the average v, in [0, 1).
        eps: how even the noise is; in units of the root mean square.
        per_leaf: one second moment for all coordinates of a leaf.

    Returns:
        An optimizer for `fit`, `PrivateRun` or `dpoptax.transforms.chain`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range. From `update`: it is inside another transformation.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(200, 20),
        ...     clip=1.0, noise_multiplier=1.0, num_steps=50, delta=1e-4,
        ... )
        >>> result = dpoptax.training.fit(
        ...     lambda mean, x: 0.5 * (mean - x) ** 2, jnp.array(0.0), jnp.ones(200), plan=plan,
        ...     optimizer=scale_then_privatize(optax.adam(0.1)),
        ...     key=jax.random.key(0), progress=False,
        ... )
        >>> abs(float(result.params) - 1) < 0.3
        True

    Reference: Ganesh, McMahan and Thakurta 2025, arXiv:2507.01129, algorithm 8; earlier, with a
    scale that is updated from time to time, Li et al. 2023, arXiv:2212.00309. A scale from the
    parameters: Jälkö et al. 2022, arXiv:2210.15961, section 3.1.
    """
    decay, eps = checked_decay("decay", decay), _validate.real("eps", eps)
    if eps <= 0:
        raise ValueError(
            f"eps must be positive, or a coordinate with a small gradient would get no noise and "
            f"no gradient; got {eps}. Pass for example 1.0."
        )

    def scale_of(params: PyTree, second_moment: PyTree) -> PyTree:
        if scale is None:
            return _from_second_moments(second_moment, eps, params)
        factors = jax.tree.map(jnp.asarray, jax.tree.broadcast(scale(params), params))
        return jax.tree.map(
            lambda s, leaf: _bounded(s.astype(wide_dtype(leaf.dtype))), factors, params
        )

    def wrap(private: PrivateTransformation) -> PrivateTransformation:
        return _scaled(private, scale_of, None if scale is not None else (decay, per_leaf))

    return PrivateOptimizer("scale_then_privatize", optimizer, wrap)


def _scaled(
    private: PrivateTransformation, scale_of: Scale, averaging: tuple[float, bool] | None
) -> PrivateTransformation:
    """Returns `private` on scaled gradients; `averaging` is the decay, and whether by leaf."""

    def init(params: PyTree) -> ScaledState:
        moments = None
        if averaging is not None:
            moments = jax.tree.map(
                lambda leaf: jnp.zeros(() if averaging[1] else leaf.shape, wide_dtype(leaf.dtype)),
                params,
            )
        return ScaledState(private.init(params), moments)

    def update(
        updates: Any, state: ScaledState, params: Any = None, **extra_args: Any
    ) -> tuple[PyTree, ScaledState]:
        del extra_args
        params = require_params(params)
        factors = scale_of(params, state.second_moment)
        grads = as_per_example_grads(updates, params)
        noisy, inner = private.update(ScaledGrads(grads.mask, grads, factors), state.inner, params)
        release = jax.tree.map(lambda g, s: (widen(g) / s).astype(g.dtype), noisy, factors)
        moments = state.second_moment
        if averaging is not None:
            decay, per_leaf = averaging
            moments = jax.tree.map(
                lambda v, g: decay * v + (1 - decay) * _square(g, per_leaf), moments, release
            )
        return release, ScaledState(inner, moments)

    def noise_stddev(state: ScaledState, params: PyTree) -> PyTree:
        factors = scale_of(require_params(params), state.second_moment)
        stddevs = stddev_of(private, state.inner, params)
        if stddevs is None:
            return None
        return jax.tree.map(lambda sd, s: sd / s, jax.tree.broadcast(stddevs, factors), factors)

    # As in disk(scale_then_privatize(...)): the filter is inside.
    inner_point = private.gradient_point

    def gradient_point(params: PyTree, state: ScaledState) -> PyTree:
        assert inner_point is not None
        return inner_point(params, state.inner)

    return PrivateTransformation(
        init,
        update,
        noise_stddev=noise_stddev,
        gradient_point=None if inner_point is None else gradient_point,
    )


def _square(leaf: Array, per_leaf: bool) -> Array:
    square = jnp.square(widen(leaf))
    return jnp.mean(square) if per_leaf and leaf.size else square


def _from_second_moments(moments: PyTree, eps: float, params: PyTree) -> PyTree:
    """Returns 1/u; see `scale_then_privatize`."""
    sizes = jax.tree.map(lambda leaf: leaf.size, params)
    total = max(sum(jax.tree.leaves(sizes)), 1)

    def mean(tree: PyTree) -> Array:
        # A leaf with one number stands for all its coordinates.
        parts = jax.tree.map(
            lambda leaf, size: jnp.sum(leaf) * (size / max(leaf.size, 1)), tree, sizes
        )
        return sum(part.astype(jnp.float32) for part in jax.tree.leaves(parts)) / total

    norm = jnp.sqrt(mean(moments))
    safe = jnp.where(norm > 0, norm, 1.0)
    ratios = jax.tree.map(lambda v: jnp.sqrt(v) / safe.astype(v.dtype) + eps, moments)
    rms = jnp.sqrt(mean(jax.tree.map(jnp.square, ratios)))
    return jax.tree.map(lambda r: _bounded(rms.astype(r.dtype) / r), ratios)


def _bounded(scale: Array) -> Array:
    finite = jnp.where(jnp.isfinite(scale), scale, 1.0)
    return jnp.clip(finite, 1 / _LARGEST_SCALE, _LARGEST_SCALE)
