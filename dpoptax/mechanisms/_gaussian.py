"""Gaussian mechanism in floating point: the fast one, and the default."""

import functools

import attrs
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.clipping import ClipRule
from dpoptax.mechanisms._base import noise_stddev
from dpoptax.mechanisms._gaussian_noise import add_gaussian
from dpoptax.per_example import PerExampleGrads
from dpoptax.schedules import ScalarOrSchedule, as_schedule


def _num_draws(value: int) -> int:
    return _validate.count("num_draws", value)


@attrs.frozen
class Gaussian:
    """Gaussian noise in floating point: the fast mechanism, and the default.

    Floating-point noise is not exactly Gaussian. A float32 normal takes few enough values that the
    last bits of a release can reveal the sum below it (Mironov 2012), in particular if two draws
    are made together, as here (Jin et al. 2022). It also ends at 6.8 standard deviations. With
    `num_draws=4` the noise is a sum of four draws divided by two, so that no single draw can be
    separated from the sum (Holohan and Braghin 2021), and it reaches further. This makes an attack
    harder; it is not a proof. `DiscreteGaussian` has a proof.

    Attributes:
        num_draws: how many draws make the noise of one coordinate. The time grows in proportion.
        jax_random: draw with `jax.random.normal` instead of this library's own faster code.

    Raises:
        TypeError: `num_draws` is not a whole number, or `jax_random` is not a bool.
        ValueError: `num_draws` is below 1.

    Example:
        >>> import dpoptax, jax
        >>> tx = dpoptax.privatize(
        ...     1.0,
        ...     1.1,
        ...     expected_batch_size=32,
        ...     key=jax.random.key(0),
        ...     mechanism=dpoptax.mechanisms.Gaussian(num_draws=4),
        ... )

    Reference: Mironov 2012, "On significance of the least significant bits for differential
    privacy"; Holohan and Braghin 2021, arXiv:2107.10138.
    """

    num_draws: int = attrs.field(default=1, converter=_num_draws)
    jax_random: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))

    @property
    def caveat(self) -> str:
        """See `Mechanism.caveat`."""
        drawn = "a floating-point Gaussian"
        if self.num_draws > 1:
            drawn = f"a sum of {self.num_draws} floating-point Gaussians"
        return (
            f"noise is {drawn}, treated as an exact Gaussian; through rounding, one example may "
            "move the sum 3 % beyond the clip bound, in batches of up to 65,536 (docs/numerics.md)"
        )

    def release(
        self,
        key: PRNGKeyArray,
        grads: PerExampleGrads,
        clip: ClipRule,
        noise_multiplier: ScalarOrSchedule,
        step: Int[Array, ""] | int,
    ) -> PyTree[Float[Array, "..."]]:
        """See `Mechanism.release`."""
        clipped_sum = grads.clip_and_sum(functools.partial(clip.weights, step=step))
        stddev = noise_stddev(clip, noise_multiplier, step)
        return add_gaussian(
            key, clipped_sum, stddev, num_draws=self.num_draws, jax_random=self.jax_random
        )

    def release_votes(
        self,
        key: PRNGKeyArray,
        votes: Int[Array, ""],
        noise_multiplier: ScalarOrSchedule,
        step: Int[Array, ""] | int,
        batch: int,
    ) -> Float[Array, ""]:
        """Returns the votes with Gaussian noise; see `Mechanism`."""
        del batch
        stddev = as_schedule(noise_multiplier).at(step)
        return add_gaussian(
            key,
            votes.astype(jnp.float32),
            stddev,
            num_draws=self.num_draws,
            jax_random=self.jax_random,
        )

    def check(self, clip: ClipRule, noise_multiplier: ScalarOrSchedule) -> None:
        """See `Mechanism.check`."""
        noise_stddev(clip, noise_multiplier)
