"""Correlated noise: the noise of a step cancels a part of the noise of earlier steps.

An optimizer adds the releases up. If the noise of a step is negatively correlated with that before
it, sums of many releases have less noise. This is the matrix mechanism, also called DP-FTRL.

Reference: Kairouz et al. 2021, arXiv:2103.00039; Choquette-Choo et al. 2023, arXiv:2306.08153.
"""

import functools
from typing import Any

import attrs
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, PRNGKeyArray

from dpoptax import _validate
from dpoptax._precision import wide_dtype
from dpoptax._pytree import PyTree
from dpoptax.clipping import ClipRule
from dpoptax.mechanisms._base import noise_stddev
from dpoptax.mechanisms._gaussian import Gaussian
from dpoptax.mechanisms._gaussian_noise import add_filtered, add_gaussian_by
from dpoptax.mechanisms._sharded_state import sharded_like_parameters
from dpoptax.mechanisms._state import NoiseKeys, PastKeys
from dpoptax.mechanisms._strategy import Strategy
from dpoptax.mechanisms.strategies._toeplitz import ToeplitzStrategy
from dpoptax.per_example import PerExampleGrads
from dpoptax.schedules import ScalarOrSchedule, as_schedule

# Above it, float32 would keep the new draw of a step to less than a thousandth.
LARGEST_RATIO = 1e4


def _num_draws(value: int) -> int:
    return _validate.count("num_draws", value)


def _check_strategy(mechanism: Any, attribute: Any, value: Any) -> None:
    del mechanism, attribute
    if not isinstance(value, Strategy):
        raise TypeError(
            "strategy must be one of dpoptax.mechanisms.strategies; got "
            f"{_validate.described(value)}. Pass for example "
            "BandedInverse.square_root(4, num_steps)."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        if isinstance(value, ToeplitzStrategy):
            diagonal = value.column(1)
        else:
            diagonal = np.diagonal(value.matrix())
        ratio = float((value.noise_norms() * diagonal).max())
    if not ratio <= LARGEST_RATIO:
        raise ValueError(
            f"the noise of a step may be {LARGEST_RATIO:,.0f} times as large as its new draw at "
            f"most, because rounding would replace the draw; got {type(value).__name__} with a "
            f"ratio of {ratio:.3g}. Take smaller numbers after the first, such as those of "
            "BandedInverse.square_root."
        )


@attrs.frozen
class Correlated:
    """Gaussian noise that is correlated over the steps of a run.

    The noise of step t is `noise_multiplier * l2_clip` times row t of `C^-1 Z`. `C` is the matrix
    of the strategy, and `Z` has one independent normal draw per step and coordinate. The largest
    column of `C` has norm one, so the noise multiplier means what it means for `Gaussian` if each
    example takes part in one step.

    If the strategy has taps, `C^-1` has few diagonals, and the noise of a step is a sum of a few
    draws. The draws of earlier steps are made again from their keys. So the state holds these keys,
    and no copy of the parameters. Draws are added to the sum one at a time. Another strategy keeps
    arrays like the parameters, in float32 or wider, sharded as they are.

    **The state is secret, as a key is.** Whoever has it can compute noise and subtract it. It is in
    the state of the transformation and in checkpoints.

    A run cannot have more steps than the strategy. `fit`, `PrivateRun` and `Plan` refuse it. In a
    loop of your own, a step beyond the last raises an error. Inside `jax.jit`, where the number of
    the step is not known, it releases NaN, which depends on no example.

    Attributes:
        strategy: the matrix, and how its noise is computed.
        num_draws: as in `Gaussian`.
        jax_random: as in `Gaussian`.

    Raises:
        TypeError: `strategy` is no `Strategy`, or as in `Gaussian`.
        ValueError: `num_draws` is below 1, or the noise of earlier steps is so large that rounding
            would lose the new draw of a step. From `check`: the clip bound or the noise follows a
            schedule. Their cost together with correlated noise is not known.

    Example:
        >>> import dpoptax, jax
        >>> from dpoptax.mechanisms.strategies import BandedInverse
        >>> tx = dpoptax.privatize(
        ...     1.0,
        ...     1.1,
        ...     expected_batch_size=32,
        ...     key=jax.random.key(0),
        ...     mechanism=Correlated(BandedInverse.square_root(4, num_steps=100)),
        ... )

    Reference: Choquette-Choo et al. 2023, arXiv:2306.08153, algorithm 1; taps: Kalinin et al. 2025,
    arXiv:2505.12128.
    """

    strategy: Strategy = attrs.field(validator=_check_strategy)
    num_draws: int = attrs.field(default=1, converter=_num_draws)
    jax_random: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))

    @property
    def caveat(self) -> str:
        """See `Mechanism.caveat`."""
        return (
            f"{Gaussian(self.num_draws, self.jax_random).caveat}; the noise of a step is "
            "correlated with that of the other steps of the run"
        )

    @property
    def num_steps(self) -> int:
        """How many steps a run may have: those of the strategy."""
        return self.strategy.num_steps

    def init(self, params: PyTree, key: PRNGKeyArray) -> PyTree:
        """Returns the state of the strategy, or keys of earlier steps, which are not used yet.

        See `StatefulMechanism.init`.
        """
        taps = self.strategy.taps
        if taps is None:
            return sharded_like_parameters(self._init_strategy, params)
        past = len(taps) - 1
        return PastKeys(jnp.broadcast_to(key, (past,))) if past else ()

    def _init_strategy(self, params: PyTree) -> PyTree:
        like = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide_dtype(leaf.dtype)), params)
        return self.strategy.init(like)

    def release_with_state(
        self,
        keys: NoiseKeys,
        grads: PerExampleGrads,
        clip: ClipRule,
        noise_multiplier: ScalarOrSchedule,
        step: Int[Array, ""] | int,
        state: Any,
    ) -> tuple[PyTree[Float[Array, "..."]], PyTree]:
        """See `StatefulMechanism.release_with_state`."""
        clipped_sum = grads.clip_and_sum(functools.partial(clip.weights, step=step))
        stddev = noise_stddev(clip, noise_multiplier, step)
        if self.strategy.taps is None:
            return self._add_by_strategy(keys, clipped_sum, stddev, step, state)
        return self._add_by_taps(keys, clipped_sum, stddev, step, state)

    def noise_scales(self) -> Float64[np.ndarray, " steps"]:
        """See `StatefulMechanism.noise_scales`."""
        return self.strategy.noise_norms()

    def check(self, clip: ClipRule, noise_multiplier: ScalarOrSchedule) -> None:
        """See `Mechanism.check`."""
        noise_stddev(clip, noise_multiplier)
        for name, value in (("l2_clip", clip.l2_clip), ("noise_multiplier", noise_multiplier)):
            schedule = as_schedule(value)
            if schedule.min != schedule.max:
                raise ValueError(
                    f"correlated noise needs a constant {name}, because the steps of a run are "
                    f"accounted together; got a schedule from {schedule.min} to {schedule.max}. "
                    "Pass one number, or use mechanisms.Gaussian()."
                )

    def _add_by_taps(
        self,
        keys: NoiseKeys,
        clipped_sum: PyTree,
        stddev: float | Float[Array, ""],
        step: Int[Array, ""] | int,
        state: Any,
    ) -> tuple[PyTree, PyTree]:
        taps = self.strategy.taps
        assert taps is not None
        # The root of this step, and those of the steps before it, the latest first.
        roots = keys.root[None]
        if len(taps) > 1:
            roots = jnp.concatenate([roots, state.keys])

        def key_of(age: Int[Array, ""] | int) -> PRNGKeyArray:
            return keys.derive(roots[age], step - age)

        noisy = add_filtered(
            key_of,
            taps,
            # Before the first step nothing was drawn.
            jnp.minimum(len(taps), step + 1),
            clipped_sum,
            stddev,
            num_draws=self.num_draws,
            jax_random=self.jax_random,
        )
        return noisy, PastKeys(roots[:-1]) if len(taps) > 1 else ()

    def _add_by_strategy(
        self,
        keys: NoiseKeys,
        clipped_sum: PyTree,
        stddev: float | Float[Array, ""],
        step: Int[Array, ""] | int,
        state: Any,
    ) -> tuple[PyTree, PyTree]:
        return add_gaussian_by(
            lambda white: self.strategy.next(white, state, jnp.asarray(step, jnp.int32)),
            keys.current,
            clipped_sum,
            stddev,
            state,
            num_draws=self.num_draws,
            jax_random=self.jax_random,
        )
