"""DP-AdamBC: Adam with the second moment corrected for the variance of the noise.

The noise of a release adds its variance to every second moment. It is often larger than the squared
gradient, so Adam divides all coordinates by about the same number and becomes SGD with momentum.
The variance is a public number, so it can be subtracted.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from dpoptax import _validate
from dpoptax._precision import wide_dtype, widen
from dpoptax._pytree import PyTree
from dpoptax.transforms._private import checked_decay, one_minus_power


class AdamBcState(NamedTuple):
    """The number of updates, and both moments in float32 or wider; `nu` without the noise."""

    step: Int[Array, ""]
    mu: PyTree
    nu: PyTree


def scale_by_adam_bc(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, floor: float = 0.01
) -> optax.GradientTransformationExtraArgs:
    """Scales a released gradient as Adam does, without the noise in the second moment.

    With g the released gradient, s its noise's standard deviation and t the number of the update,

        m_t = b1 m_{t-1} + (1 - b1) g,    v_t = b2 v_{t-1} + (1 - b2) (g**2 - s**2)
        update = m_t / (1 - b1**t) / (sqrt(max(v_t / (1 - b2**t), floor * s**2)) + eps)

    For constant noise this is the correction of the paper, v / (1 - b2**t) - s**2. It is also exact
    for schedules of noise, clip or batch size, because each release is corrected by its own noise.

    s is no argument: `fit`, `PrivateRun` and `dpoptax.transforms.chain` pass it on from the clip,
    the noise and the batch size that ran. Put nothing that scales or filters the gradient between
    `privatize` and this transformation, since the noise would be another one there. Without noise
    it is `optax.scale_by_adam`. It is post-processing and costs no privacy. Its memory is that of
    Adam. Coordinates at the floor take steps that are up to 1 / sqrt(floor) times those of Adam, so
    choose a smaller learning rate than for Adam.

    Args:
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment, in the unit of the gradient.
        floor: lower bound of the second moment, in units of the variance of the noise. It takes the
            place of the constant gamma' of the paper, which has the unit of a squared gradient.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to follow `privatize` directly.

    Raises:
        TypeError: an argument is not a number.
        ValueError: a number is out of range. From `update`: the noise is not known.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(200, 20),
        ...     clip=1.0, noise_multiplier=1.0, num_steps=50, delta=1e-4,
        ... )
        >>> result = dpoptax.training.fit(
        ...     lambda mean, x: 0.5 * (mean - x) ** 2, jnp.array(0.0), jnp.ones(200), plan=plan,
        ...     optimizer=optax.chain(scale_by_adam_bc(), optax.scale_by_learning_rate(0.05)),
        ...     key=jax.random.key(0), progress=False,
        ... )
        >>> abs(float(result.params) - 1) < 0.3
        True

    Reference: Tang, Shpilevskiy and Lécuyer 2024, arXiv:2312.14334, algorithm 1.
    """
    b1, b2 = checked_decay("b1", b1), checked_decay("b2", b2)
    eps, floor = _validate.non_negative("eps", eps), _validate.non_negative("floor", floor)

    def init(params: PyTree) -> AdamBcState:
        # Two trees: a step that gives its buffers away must not find one of them twice.
        mu, nu = (
            jax.tree.map(lambda leaf: jnp.zeros_like(leaf, wide_dtype(leaf.dtype)), params)
            for _ in range(2)
        )
        return AdamBcState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        updates: PyTree,
        state: AdamBcState,
        params: Any = None,
        *,
        noise_stddev: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, AdamBcState]:
        del params, extra_args
        stddevs = jax.tree.broadcast(_required(noise_stddev), updates)
        count = state.step + 1
        variances = jax.tree.map(
            lambda s, g: jnp.square(jnp.asarray(s, wide_dtype(g.dtype))), stddevs, updates
        )
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * widen(g), state.mu, updates)
        nu = jax.tree.map(
            lambda v, g, s2: b2 * v + (1 - b2) * (jnp.square(widen(g)) - s2),
            *(state.nu, updates, variances),
        )
        first, second = (one_minus_power(b, count.astype(jnp.float32)) for b in (b1, b2))

        def scaled(g: Array, m: Array, v: Array, s2: Array) -> Array:
            corrected = jnp.maximum(v / second.astype(v.dtype), floor * s2)
            return (m / first.astype(m.dtype) / (jnp.sqrt(corrected) + eps)).astype(g.dtype)

        return jax.tree.map(scaled, updates, mu, nu, variances), AdamBcState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _required(noise_stddev: PyTree | None) -> PyTree:
    if noise_stddev is None:
        raise ValueError(
            "scale_by_adam_bc needs the noise of the release that it gets; got a release whose "
            "noise is not known. Use dpoptax.transforms.chain(privatize(...), optimizer) in place "
            "of optax.chain, or pass the optimizer to fit. After an objective that transforms the "
            "gradient, such as aligned_elbo, and after disk the noise is not known: use optax.adam."
        )
    return noise_stddev
