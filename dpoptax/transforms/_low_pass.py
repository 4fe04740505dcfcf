"""Low-pass filter of released gradients.

From step to step the gradient changes slowly, and the noise is new each time. A filter that keeps
low frequencies keeps most of the gradient and less of the noise.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from dpoptax import _validate
from dpoptax._precision import wide_dtype, widen
from dpoptax._pytree import PyTree

# How many steps the normaliser of a filter is checked for. A stable filter has settled by then.
_CHECKED_STEPS = 1000


class LowPassState(NamedTuple):
    """The last outputs before normalisation and the last inputs, the latest first.

    Each is a pair: a tree like the parameters, and what the filter makes of the number one. The
    second is the normaliser.
    """

    outputs: tuple[tuple[PyTree, Float[Array, ""]], ...]
    inputs: tuple[tuple[PyTree, Float[Array, ""]], ...]


def low_pass(
    b: Sequence[float] = (0.05, 0.05), a: Sequence[float] = (-0.9,)
) -> optax.GradientTransformation:
    """Filters released gradients by a linear filter; the gradient stays, noise is averaged out.

    With g the released gradient, m_t = c_t = 0 before the first step, and i_t one from the first
    step on,

        m_t = sum_{k=0} b_k g_{t-k} - sum_{k=1} a_k m_{t-k}
        c_t = sum_{k=0} b_k i_{t-k} - sum_{k=1} a_k c_{t-k}
        output = m_t / c_t

    The default is a first-order filter that averages over about 10 steps and leaves out the highest
    frequency. `low_pass((1 - d,), (-d,))` is an exponential average with decay d, without its bias.

    It is post-processing and costs no privacy. It keeps one copy of the parameters for each
    coefficient but b_0. Put it directly after `privatize`. It averages as momentum does, so it
    gains little before an optimizer with momentum.

    Args:
        b: coefficients of this release and the ones before it.
        a: coefficients a_1, a_2, ... of the outputs before this one.

    Returns:
        An `optax.GradientTransformation`.

    Raises:
        TypeError: a coefficient is not a number.
        ValueError: the filter is unstable, has no b_0, or its normaliser is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = low_pass()
        >>> state = tx.init(jnp.array(0.0))
        >>> for gradient in (1.0, 1.0, -1.0):
        ...     output, state = tx.update(jnp.array(gradient), state)
        ...     print(round(float(output), 3))
        1.0
        1.0
        0.566

    Reference: Zhang, Bu, Hong and Razaviyayn 2024, arXiv:2408.13460 (DOPPLER), algorithm 1. The
    paper's normaliser sums all b_k from the first step on; this one only those of steps that exist,
    so it is exact for a constant gradient.
    """
    ahead = [_validate.real("b", value) for value in b]
    back = [_validate.real("a", value) for value in a]
    _check_filter(ahead, back)

    def init(params: PyTree) -> LowPassState:
        def zeros() -> tuple[PyTree, Array]:
            tree = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, wide_dtype(leaf.dtype)), params)
            return tree, jnp.zeros(())

        return LowPassState(tuple(zeros() for _ in back), tuple(zeros() for _ in ahead[1:]))

    def update(
        updates: PyTree, state: LowPassState, params: Any = None
    ) -> tuple[PyTree, LowPassState]:
        del params
        inputs = ((jax.tree.map(widen, updates), jnp.ones(())), *state.inputs)

        def combine(*leaves: Array) -> Array:
            # The coefficients of outputs change their sign, as in the formula.
            weights = [*ahead, *(-weight for weight in back)]
            terms = [weight * leaf for weight, leaf in zip(weights, leaves, strict=True)]
            return sum(terms[1:], start=terms[0])

        output = jax.tree.map(combine, *inputs, *state.outputs)
        total, normaliser = output
        filtered = jax.tree.map(
            lambda m, g: (m / normaliser.astype(m.dtype)).astype(g.dtype), total, updates
        )
        return filtered, LowPassState(
            (output, *state.outputs)[: len(back)], inputs[: len(ahead) - 1]
        )

    return optax.GradientTransformation(init, update)


def _check_filter(b: Sequence[float], a: Sequence[float]) -> None:
    if not b or b[0] == 0:
        raise ValueError(
            f"expected a coefficient b_0 other than zero for this release; got b={tuple(b)}. "
            "Leave out leading zeros."
        )
    if a and np.abs(np.roots([1.0, *a])).max() >= 1:
        raise ValueError(
            f"expected a stable filter, whose poles are inside the unit circle; got a={tuple(a)}. "
            "a_k multiplies earlier outputs with a minus: pass (-0.9,) for a decay of 0.9."
        )
    inputs, outputs = np.ones(_CHECKED_STEPS), np.zeros(_CHECKED_STEPS + len(a))
    driven = np.convolve(inputs, b)[:_CHECKED_STEPS]
    for step in range(_CHECKED_STEPS):
        before = outputs[step : step + len(a)][::-1]
        outputs[step + len(a)] = driven[step] - float(np.dot(a, before))
    if not np.all(outputs[len(a) :] > 0):
        raise ValueError(
            "expected a filter whose response to a constant gradient is positive in every step; "
            f"got b={tuple(b)}, a={tuple(a)}. A low-pass filter has sum(b) / (1 + sum(a)) > 0."
        )
