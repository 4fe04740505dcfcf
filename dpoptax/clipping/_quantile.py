"""Adaptive clipping: the bound follows a quantile of the gradient norms, by private counts."""

from typing import NamedTuple

import attrs
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.clipping._bound import SMALLEST_CLIP, norms_and_finite, weight_within
from dpoptax.relations import Relation, parse_relation

# Between these bounds float32 holds the bound, its square and its inverse, with room on both sides.
LARGEST_CLIP = 1 / SMALLEST_CLIP
LARGEST_RATE = 10.0


class QuantileClipState(NamedTuple):
    """The state of `QuantileClip`. It follows from what was released, so you may log it.

    Attributes:
        l2_clip: the clip bound of the next step.
    """

    l2_clip: Float[Array, ""]


class CurrentClip(NamedTuple):
    """Flat clipping by a bound that is an array, and so may be traced."""

    l2_clip: Float[Array, ""]

    def weights(
        self, squared_norms: PyTree[Float[Array, " batch"]], step: Int[Array, ""] | int = 0
    ) -> Float[Array, " batch"]:
        """See `ClipRule.weights`."""
        del step
        norms, finite = norms_and_finite(squared_norms)
        return weight_within(self.l2_clip.astype(norms.dtype), norms, finite)

    def sensitivity(self, relation: Relation) -> Float[Array, ""]:
        """See `ClipRule.sensitivity`."""
        return (2 if parse_relation(relation).name == "REPLACE_ONE" else 1) * self.l2_clip


def _initial(value: float) -> float:
    initial = _validate.positive("initial", value)
    if not SMALLEST_CLIP <= initial <= LARGEST_CLIP:
        raise ValueError(
            f"initial must be between {SMALLEST_CLIP} and {LARGEST_CLIP:g}, the range of the "
            f"bound; got {initial}. Scale the loss instead."
        )
    return initial


def _learning_rate(value: float) -> float:
    rate = _validate.positive("learning_rate", value)
    if rate > LARGEST_RATE:
        raise ValueError(
            f"learning_rate is that of the logarithm of the bound, at most {LARGEST_RATE:g}; got "
            f"{rate}. A usual choice is 0.2."
        )
    return rate


def _quantile(value: float) -> float:
    quantile = _validate.real("quantile", value)
    if not 0 < quantile < 1:
        raise ValueError(
            "quantile is the fraction of the gradient norms below the bound, strictly between 0 "
            f"and 1; got {quantile}. A usual choice is 0.5."
        )
    return quantile


def _count_noise(value: float | None) -> float | None:
    return None if value is None else _validate.positive("count_noise", value)


@attrs.frozen
class QuantileClip:
    """Clips to a bound that follows a quantile of the gradient norms.

    The bound C of a step clips as in `FlatClip`. With the gradient, the step releases how many
    examples of the batch have norms of at most C, with noise. Then

        C <- C exp(-learning_rate (fraction - quantile)),
        fraction = 1/2 + (sum_i (1[norm_i <= C] - 1/2) + count_noise N(0, 1)) / expected_batch_size.

    The noise multiplier of a plan is that of the whole step: of the gradient and the count
    together. The gradient gets `(noise_multiplier^-2 - (2 count_noise)^-2)^(-1/2)`, which is a
    little more. So epsilon is that of any other rule with this noise multiplier, and nothing else
    has to be accounted. `docs/accounting.md` has the proof, for every sampler and relation.

    The count is a whole number, shifted by half of the number of examples. It is computed exactly,
    from the norms that also clip. An example with a gradient that is not finite does not count.

    The bound is part of what is released. So you may log it: `optax.tree_utils.tree_get(opt_state,
    "l2_clip")` finds it in the state of an optimizer, and `Progress.l2_clip` has it in `fit`.

    Attributes:
        initial: the bound of the first step, in the unit of the gradient. With the default
            settings, about twenty steps correct a guess that is wrong by a factor of ten.
        quantile: the fraction of the norms that the bound shall exceed; strictly between 0 and 1.
            0.5 is the usual choice.
        learning_rate: of the logarithm of the bound.
        count_noise: standard deviation of the noise on the count, in examples. By default five
            times the noise multiplier, which adds 0.5 % to the noise of the gradient. Andrew et al.
            take a twentieth of the batch size. It must be more than half of the noise multiplier.

    Raises:
        TypeError: an argument is not a number.
        ValueError: a number is out of range. From a plan or `privatize`: the count alone would cost
            more than the whole step may.

    Example:
        >>> import dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(60_000, 512),
        ...     clip=QuantileClip(1.0, quantile=0.5),
        ...     noise_multiplier=1.0,
        ...     num_steps=1000,
        ...     delta=1e-5,
        ... )
        >>> plan.epsilon() == plan.replace(clip=1.0).epsilon()
        True
        >>> round(plan.gradient_noise_multiplier, 4)
        1.005

    Reference: Andrew, Thakkar, McMahan and Ramaswamy 2021, arXiv:1905.03871, algorithm 1 and
    theorem 1.
    """

    initial: float = attrs.field(default=1.0, converter=_initial)
    quantile: float = attrs.field(default=0.5, converter=_quantile, kw_only=True)
    learning_rate: float = attrs.field(default=0.2, converter=_learning_rate, kw_only=True)
    count_noise: float | None = attrs.field(default=None, converter=_count_noise, kw_only=True)

    def init(self) -> QuantileClipState:
        """Returns the state before the first step."""
        return QuantileClipState(jnp.asarray(self.initial, jnp.float32))

    def at(self, state: QuantileClipState) -> CurrentClip:
        """Returns the rule of the step that starts from a state."""
        return CurrentClip(state.l2_clip)

    def votes(
        self, squared_norms: PyTree[Float[Array, " batch"]], state: QuantileClipState
    ) -> Int[Array, " batch"]:
        """Returns 1 for an example that the bound does not clip, and -1 for one that it clips."""
        unclipped = self.at(state).weights(squared_norms) == 1
        return jnp.where(unclipped, 1, -1).astype(jnp.int32)

    def update(
        self,
        state: QuantileClipState,
        noisy_votes: Float[Array, ""],
        expected_batch_size: float | Float[Array, ""],
    ) -> QuantileClipState:
        """Returns the state of the next step."""
        # A vote is twice an indicator that is shifted by one half.
        size = jnp.asarray(expected_batch_size, jnp.float32)
        fraction = 0.5 + noisy_votes / (2 * size)
        bound = state.l2_clip * jnp.exp(-self.learning_rate * (fraction - self.quantile))
        # Whatever the noise, the bound stays a number that float32 can compute with. An overflow of
        # the exponential is infinite and not NaN, so it ends at the largest bound.
        return QuantileClipState(jnp.clip(bound, SMALLEST_CLIP, LARGEST_CLIP))
