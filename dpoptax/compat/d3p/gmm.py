"""The Gaussian mixture of `d3p.gmm`, whose components are summed out of the density."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array
from numpyro.distributions import Categorical, MixtureSameFamily, Normal

__all__ = ["GaussianMixture"]


def __dir__() -> list[str]:
    return __all__


class GaussianMixture(MixtureSameFamily):  # type: ignore[misc]
    r"""Mixture of Gaussians with independent axes,

    $$p(x) = \sum_k \pi_k \prod_j N(x_j; \mu_{kj}, \sigma_{kj}^2).$$

    Args:
        locs: means, `(k, ...)`; the first axis is that of the components.
        scales: standard deviations, of the same shape or `(k, 1, ...)`.
        mixture_probabilities: the weights, `(k,)`.
        validate_args: as in NumPyro.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> mixture = GaussianMixture(jnp.zeros((3, 2)), jnp.ones((3, 2)), jnp.ones(3) / 3)
        >>> mixture.event_shape, mixture.num_components, mixture.mean.tolist()
        ((2,), 3, [0.0, 0.0])
        >>> x, [components] = mixture.sample_with_intermediates(jax.random.key(0), (5,))
        >>> x.shape, components.shape
        ((5, 2), (5,))
    """  # noqa: D415

    def __init__(
        self,
        locs: Any,
        scales: Any,
        mixture_probabilities: Any,
        validate_args: bool | None = None,
    ) -> None:
        locs, scales = jnp.broadcast_arrays(jnp.asarray(locs), jnp.asarray(scales))
        super().__init__(
            Categorical(probs=jnp.asarray(mixture_probabilities)),
            Normal(locs, scales).to_event(locs.ndim - 1),
            validate_args=validate_args,
        )

    @property
    def locs(self) -> Array:
        """The means of the components."""
        return self.component_distribution.mean

    @property
    def scales(self) -> Array:
        """The standard deviations of the components."""
        return jnp.sqrt(self.component_distribution.variance)

    @property
    def mixture_probabilities(self) -> Array:
        """The weights of the components."""
        return self.mixing_distribution.probs

    @property
    def num_components(self) -> int:
        """How many components there are."""
        return int(self.mixture_size)
