"""Probabilities of categories, from noisy counts."""

import attrs
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dpoptax import _validate
from dpoptax.accounting import Ledger
from dpoptax.random._derive import fingerprint
from dpoptax.vi.conjugate._counts import draw_counts
from dpoptax.vi.conjugate._fields import is_positive, number
from dpoptax.vi.conjugate._release import (
    NoisyStatistics,
    charge_and_release,
    noisy_counts,
    refuse_other_than_numbers,
)


def _at_least_two(value: int) -> int:
    return _validate.count("num_categories", value, at_least=2)


@attrs.frozen(kw_only=True)
class DirichletMultinomial:
    """Probabilities of categories from private counts, with a symmetric Dirichlet prior.

        x ~ Categorical(p),  p ~ Dirichlet(concentration, ..., concentration)

    `release` releases the number of examples of each category. One example adds 1 to one of them,
    so one more moves the counts by 1, and one that replaces another by √2. The noise is discrete
    Gaussian noise on whole numbers, which no rounding weakens.

    `posterior` is exact: it knows that the counts are whole numbers, that none is negative, and
    that they sum to the public number of examples. Its time grows with the square of the number of
    categories.

    Attributes:
        num_categories: how many there are; a public number.
        concentration: of the prior, the same for every category.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range.

    Example:
        >>> import dpoptax, jax, jax.numpy as jnp
        >>> sampler = dpoptax.samplers.Poisson(1000, 1000)
        >>> ledger = dpoptax.accounting.Ledger(sampler, clip=1.0, delta=1e-5)
        >>> x = jnp.arange(1000) % 4
        >>> model = DirichletMultinomial(num_categories=4)
        >>> noisy = model.release(x, noise_multiplier=2.0, ledger=ledger)
        >>> model.posterior(noisy, 500, key=jax.random.key(0))["probabilities"].shape
        (500, 4)

    Reference: Bernstein and Sheldon 2018, arXiv:1809.02188, for posteriors that know the noise.
    """

    num_categories: int = attrs.field(converter=_at_least_two)
    concentration: float = attrs.field(default=1.0, converter=number, validator=is_positive)

    def release(
        self,
        data: Int[Array, " examples"],
        *,
        noise_multiplier: float,
        ledger: Ledger,
        key: PRNGKeyArray | None = None,
    ) -> NoisyStatistics:
        """Releases the counts with noise, and charges the ledger before.

        Args:
            data: the category of each example, from 0 on. Another number counts nowhere.
            noise_multiplier: standard deviation of the noise divided by the sensitivity.
            ledger: is charged one Gaussian mechanism with this noise multiplier.
            key: for this release and nothing else; a new secret key by default.

        Returns:
            The counts with noise.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: a shape or a number is wrong, or the values are traced.
        """
        refuse_other_than_numbers(data)
        if np.ndim(data) != 1 or not jnp.issubdtype(jnp.result_type(data), jnp.integer):
            raise ValueError(
                "data must be whole numbers of the shape (examples,); got "
                f"{jnp.result_type(data)} of shape {np.shape(data)}."
            )
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
    ) -> dict[str, Float[Array, "draws categories"]]:
        """Draws from the posterior given the release. This is post-processing and costs nothing.

        Args:
            noisy: what `release` returned.
            num_samples: how many draws.
            key: for these draws; nothing rests on its secrecy.

        Returns:
            `probabilities`, `(num_samples, num_categories)`.

        Raises:
            ValueError: the release is of another model.
        """
        num_samples = _validate.count("num_samples", num_samples)
        if np.shape(noisy.values) != (self.num_categories,):
            raise ValueError(
                f"a release of this model has {self.num_categories} numbers; got the shape "
                f"{np.shape(noisy.values)}. Pass what release of the same model returned."
            )
        count_key, dirichlet_key = jax.random.split(_validate.typed_key("key", key))
        uniforms = jax.random.uniform(count_key, (num_samples, self.num_categories))
        counts = draw_counts(
            np.asarray(noisy.values, np.float64),
            noisy.noise_stddev,
            noisy.num_examples,
            np.full(self.num_categories, self.concentration),
            np.asarray(uniforms, np.float64),
        )
        concentrations = jnp.asarray(self.concentration + counts, jnp.float32)
        return {"probabilities": jax.random.dirichlet(dirichlet_key, concentrations)}

    def _noisy_sum(
        self, key: PRNGKeyArray, data: Array, noise_multiplier: float
    ) -> tuple[Float[Array, " categories"], float]:
        counts = jnp.stack(
            [
                jnp.sum(data == jnp.asarray(category, data.dtype), dtype=jnp.int32)
                for category in range(self.num_categories)
            ]
        )
        return noisy_counts(key, counts, len(data), noise_multiplier)
