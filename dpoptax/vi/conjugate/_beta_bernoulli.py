"""Probability of a success, from a noisy number of successes."""

import attrs
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from dpoptax import _validate
from dpoptax.accounting import Ledger
from dpoptax.random._derive import fingerprint
from dpoptax.vi.conjugate._counts import successes_posterior
from dpoptax.vi.conjugate._fields import is_positive, number
from dpoptax.vi.conjugate._release import (
    NoisyStatistics,
    charge_and_release,
    noisy_counts,
    refuse_other_than_numbers,
)


@attrs.frozen(kw_only=True)
class BetaBernoulli:
    """Probability of a success from a private number of successes, with a beta prior.

        x ~ Bernoulli(p),  p ~ Beta(alpha, beta)

    `release` releases the sum of 2 x - 1, whose terms are -1 and 1: one example more moves it by 1,
    and one that replaces another by 2. With the public number of examples N, the number of
    successes is half of the sum plus N / 2. So its noise is half as large as that of a plain count.
    The noise is discrete Gaussian noise on whole numbers, which no rounding weakens.

    `posterior` sums over all numbers of successes, so it is exact.

    Attributes:
        alpha: of the prior.
        beta: of the prior.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is not positive.

    Example:
        >>> import dpoptax, jax, jax.numpy as jnp
        >>> sampler = dpoptax.samplers.Poisson(1000, 1000)
        >>> ledger = dpoptax.accounting.Ledger(sampler, clip=1.0, delta=1e-5)
        >>> x = jnp.arange(1000) < 300
        >>> model = BetaBernoulli()
        >>> noisy = model.release(x, noise_multiplier=2.0, ledger=ledger)
        >>> draws = model.posterior(noisy, 500, key=jax.random.key(0))
        >>> 0.28 < draws["probability"].mean() < 0.32
        Array(True, dtype=bool)

    Reference: Bernstein and Sheldon 2018, arXiv:1809.02188, for posteriors that know the noise.
    """

    alpha: float = attrs.field(default=1.0, converter=number, validator=is_positive)
    beta: float = attrs.field(default=1.0, converter=number, validator=is_positive)

    def release(
        self,
        data: Shaped[Array, " examples"],
        *,
        noise_multiplier: float,
        ledger: Ledger,
        key: PRNGKeyArray | None = None,
    ) -> NoisyStatistics:
        """Releases the number of successes with noise, and charges the ledger before.

        Args:
            data: 1 or True for a success, 0 or False for a failure. Another number counts as half
                of each.
            noise_multiplier: standard deviation of the noise divided by the sensitivity.
            ledger: is charged one Gaussian mechanism with this noise multiplier.
            key: for this release and nothing else; a new secret key by default.

        Returns:
            The number of successes with noise.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: a shape or a number is wrong, or the values are traced.
        """
        refuse_other_than_numbers(data)
        if np.ndim(data) != 1:
            raise ValueError(f"data must have the shape (examples,); got {np.shape(data)}.")
        return charge_and_release(
            jnp.asarray(data),
            self._noisy_sum,
            noise_multiplier=noise_multiplier,
            ledger=ledger,
            key=key,
            program=fingerprint(self),
        )

    def posterior(
        self, noisy: NoisyStatistics, num_samples: int = 1000, *, key: PRNGKeyArray
    ) -> dict[str, Float[Array, " draws"]]:
        """Draws from the posterior given the release. This is post-processing and costs nothing.

        Args:
            noisy: what `release` returned.
            num_samples: how many draws.
            key: for these draws; nothing rests on its secrecy.

        Returns:
            `probability`, `(num_samples,)`.

        Raises:
            ValueError: the release is of another model.
        """
        num_samples = _validate.count("num_samples", num_samples)
        if np.shape(noisy.values) != ():
            raise ValueError(
                f"a release of this model is one number; got the shape {np.shape(noisy.values)}. "
                "Pass what release of the same model returned."
            )
        weights = successes_posterior(
            float(noisy.values), noisy.noise_stddev, noisy.num_examples, self.alpha, self.beta
        )
        count_key, beta_key = jax.random.split(_validate.typed_key("key", key))
        uniforms = np.asarray(jax.random.uniform(count_key, (num_samples,)), np.float64)
        successes = np.searchsorted(np.cumsum(weights)[:-1], uniforms, side="right")
        alpha = jnp.asarray(self.alpha + successes, jnp.float32)
        beta = jnp.asarray(self.beta + noisy.num_examples - successes, jnp.float32)
        return {"probability": jax.random.beta(beta_key, alpha, beta)}

    def _noisy_sum(
        self, key: PRNGKeyArray, data: Array, noise_multiplier: float
    ) -> tuple[Float[Array, ""], float]:
        failure, success = (data == jnp.asarray(value, data.dtype) for value in (0, 1))
        difference = jnp.sum(success, dtype=jnp.int32) - jnp.sum(failure, dtype=jnp.int32)
        noisy, stddev = noisy_counts(key, difference[None], len(data), noise_multiplier)
        return (noisy[0] + len(data)) / 2, stddev / 2
