"""Negative ELBO of one example with local latents, as in a variational autoencoder.

With local latents no example depends on another: the loss of one example is its own negative ELBO,
so its gradient is clipped and noised like that of any other loss.

Reference: Kingma and Welling 2014, arXiv:1312.6114.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax import _validate
from dpoptax._pytree import PyTree

# `encode(params, example) -> (loc, scale)`: the Gaussian posterior of the example's latent.
Encode = Callable[[PyTree, PyTree], tuple[Float[Array, " latent"], Float[Array, " latent"]]]
# `log_likelihood(params, latent, example) -> scalar`.
LogLikelihood = Callable[[PyTree, Float[Array, " latent"], PyTree], Float[Array, ""]]


def local_elbo_loss(
    encode: Encode, log_likelihood: LogLikelihood, *, num_samples: int = 1
) -> Callable[[PyTree, PyTree, PRNGKeyArray], Float[Array, ""]]:
    """Returns a loss: the negative ELBO of one example with its own latent, as in a VAE.

        loss = -E_q[log p(x | z)] + KL(q(z | x) || N(0, I)),   z = loc + scale * N(0, I)

    The expectation is an average over reparameterised draws. The KL term is exact.

    Args:
        encode: `encode(params, example) -> (loc, scale)`, the Gaussian q(z | x), each `(latent,)`.
        log_likelihood: `log_likelihood(params, latent, example)`, the scalar log p(x | z).
        num_samples: Monte Carlo draws per example.

    Returns:
        `loss_fn(params, example, key)`, for `dpoptax.per_example_grads` or `training.fit`.

    Raises:
        TypeError: `num_samples` is not a whole number.
        ValueError: `num_samples` is below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> encode = lambda w, x: (w * x, jnp.ones(1))
        >>> log_likelihood = lambda w, z, x: -0.5 * jnp.sum((x - z) ** 2)
        >>> loss_fn = local_elbo_loss(encode, log_likelihood)
        >>> loss_fn(jnp.array(0.5), jnp.ones(1), jax.random.key(0)).shape
        ()

    Reference: Kingma and Welling 2014, arXiv:1312.6114, equation 10 and appendix B.
    """
    num_draws = _validate.count("num_samples", num_samples)

    def loss_fn(params: PyTree, example: PyTree, key: PRNGKeyArray) -> Float[Array, ""]:
        loc, scale = encode(params, example)
        noise = jax.random.normal(key, (num_draws, *loc.shape), loc.dtype)
        expected = jax.vmap(lambda draw: log_likelihood(params, loc + scale * draw, example))(noise)
        divergence = 0.5 * jnp.sum(loc**2 + scale**2 - 1 - 2 * jnp.log(scale))
        return divergence - jnp.mean(expected)

    return loss_fn
