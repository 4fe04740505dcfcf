"""Gaussian mechanism in floating point: the fast way, and the default."""

import dataclasses
import functools

from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dpoptax import _validate
from dpoptax.clipping import ClipRule
from dpoptax.mechanisms._base import noise_stddev
from dpoptax.mechanisms._gaussian_noise import add_gaussian
from dpoptax.per_example import PerExampleGrads
from dpoptax.schedules import Scheduled


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Noise of normal draws in floating point: the fast way, and the default.

    A normal of float32 takes few enough values that its last bits can betray what it was added to
    (Mironov 2012), all the more where two are drawn together, as here (Jin et al. 2022), and ends
    at 6.8 standard deviations. A sum of several, divided by the root of their number, leaves no
    single draw to be told from the sum (Holohan and Braghin 2021 propose four) and reaches further:
    a hardening, and no proof. See `DiscreteGaussian` for that.

    Attributes:
        num_draws: how many draws make the noise of one coordinate; time grows with it.

    Raises:
        TypeError: a number that is not whole.
        ValueError: a number below 1.

    Example:
        >>> import dpoptax, jax
        >>> tx = dpoptax.privatize(
        ...     1.0, 1.1, expected_batch_size=32, key=jax.random.key(0), mechanism=dpoptax.mechanisms.Gaussian(num_draws=4)
        ... )

    Reference: Mironov 2012, "On significance of the least significant bits for differential
    privacy"; Holohan and Braghin 2021, arXiv:2107.10138.
    """

    num_draws: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_draws", _validate.count("num_draws", self.num_draws))

    @property
    def caveat(self) -> str:
        """See `Mechanism.caveat`."""
        drawn = "a floating-point Gaussian"
        if self.num_draws > 1:
            drawn = f"a sum of {self.num_draws} floating-point Gaussians"
        return (
            f"noise is {drawn}, taken for an exact one; by rounding, an example may move sums "
            "3 % beyond the clip"
        )

    def release(
        self,
        key: PRNGKeyArray,
        grads: PerExampleGrads,
        clip: ClipRule,
        noise_multiplier: Scheduled,
        step: Int[Array, ""] | int,
    ) -> PyTree[Float[Array, "..."]]:
        """See `Mechanism.release`."""
        total = grads.clip_and_sum(functools.partial(clip.weights, step=step))
        stddev = noise_stddev(clip, noise_multiplier, step)
        return add_gaussian(key, total, stddev, num_draws=self.num_draws)

    def check(self, clip: ClipRule, noise_multiplier: Scheduled) -> None:
        """See `Mechanism.check`."""
        noise_stddev(clip, noise_multiplier)
