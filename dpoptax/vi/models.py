"""Models from the literature, as Flax modules and log-likelihoods of one example.

Their sizes and results are published, so they serve as references. Each is a few lines; copy one
and change it.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.vi._local_elbo import local_elbo_loss

__all__ = [
    "DenseVAE",
    "bernoulli_vae_loss",
    "hierarchical_logistic_regression",
    "logistic_regression",
]


def __dir__() -> list[str]:
    return __all__


class DenseVAE(nn.Module):  # type: ignore[misc]
    """Dense variational autoencoder: one hidden softplus layer each way, Bernoulli pixels.

    With 784 pixels, 400 hidden units, 50 latents and all parameters drawn from N(0, 0.01**2) it is
    the VAE of the d3p paper (arXiv:2103.11648), with 688,884 parameters.

    Attributes:
        pixels: number of pixels of a flat image.
        hidden: units of the hidden layer of encoder and decoder.
        latent: dimension of the latent.
        kernel_init: initializer of all weights.
        bias_init: initializer of all biases.
        num_classes: number of classes of a label that encoder and decoder see; 0 for no label.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> variables = DenseVAE().init(jax.random.key(0), jnp.zeros(784))
        >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
        688884
    """

    pixels: int = 784
    hidden: int = 400
    latent: int = 50
    kernel_init: Any = nn.initializers.normal(0.01)
    bias_init: Any = nn.initializers.normal(0.01)
    num_classes: int = 0

    def setup(self) -> None:
        """Makes the five layers."""
        dense = functools.partial(nn.Dense, kernel_init=self.kernel_init, bias_init=self.bias_init)
        self.encoder_hidden: nn.Dense = dense(self.hidden)
        self.loc: nn.Dense = dense(self.latent)
        self.log_scale: nn.Dense = dense(self.latent)
        self.decoder_hidden: nn.Dense = dense(self.hidden)
        self.logits: nn.Dense = dense(self.pixels)

    def encode(self, image: Array, label: Array | None = None) -> tuple[Array, Array]:
        """Returns the mean and the standard deviation of q(z | x)."""
        hidden = nn.softplus(self.encoder_hidden(self._labelled(image, label)))
        return self.loc(hidden), jnp.exp(self.log_scale(hidden))

    def decode(self, latent: Array, label: Array | None = None) -> Array:
        """Returns the logits of p(x | z), one for each pixel."""
        return self.logits(nn.softplus(self.decoder_hidden(self._labelled(latent, label))))

    def __call__(self, image: Array, label: Array | None = None) -> Array:
        """Returns the logits of a reconstruction from the mean of q(z | x)."""
        return self.decode(self.encode(image, label)[0], label)

    def _labelled(self, x: Array, label: Array | None) -> Array:
        if label is None:
            return x
        return jnp.concatenate([x, jax.nn.one_hot(label, self.num_classes, dtype=x.dtype)], -1)


def bernoulli_vae_loss(
    model: nn.Module, *, num_samples: int = 1, redraw: bool = False
) -> Callable[[PyTree, PyTree, PRNGKeyArray], Float[Array, ""]]:
    """Returns a loss: the negative ELBO of one image under a VAE with Bernoulli pixels, in nats.

    A grey pixel is the probability of a white one. The log-likelihood is linear in the pixel, so
    for the decoder this equals the average over black-and-white images drawn from these
    probabilities.

    Args:
        model: a `DenseVAE`, or a module with the same `encode` and `decode`.
        num_samples: draws of the latent per image.
        redraw: if True, draw a black-and-white image from the probabilities in every step, as d3p
            does.

    Returns:
        `loss_fn(params, image, key)`, or `loss_fn(params, (image, label), key)`.

    Raises:
        TypeError: `num_samples` is not a whole number.
        ValueError: `num_samples` is below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = DenseVAE(pixels=16, hidden=8, latent=2)
        >>> params = model.init(jax.random.key(0), jnp.zeros(16))["params"]
        >>> loss = bernoulli_vae_loss(model)(params, jnp.zeros(16), jax.random.key(1))
        >>> 10.0 < float(loss) < 12.5  # 16 log 2 = 11.09 before training
        True

    Reference: Kingma and Welling 2014, arXiv:1312.6114.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = DenseVAE(pixels=4, hidden=3, latent=2)
        >>> params = model.init(jax.random.key(0), jnp.ones(4), method=model.encode)
        >>> loc, scale = model.apply(params, jnp.ones(4), method=model.encode)
        >>> loc.shape, scale.shape
        ((2,), (2,))
    """

    def encode(params: PyTree, example: PyTree) -> tuple[Array, Array]:
        found: tuple[Array, Array] = model.apply(
            {"params": params}, *_as_tuple(example), method="encode"
        )
        return found

    def log_likelihood(params: PyTree, latent: Array, example: PyTree) -> Array:
        image, *label = _as_tuple(example)
        logits = model.apply({"params": params}, latent, *label, method="decode")
        return -jnp.sum(optax.sigmoid_binary_cross_entropy(logits, image))

    loss_fn = local_elbo_loss(encode, log_likelihood, num_samples=num_samples)
    if not redraw:
        return loss_fn

    def redrawn_loss_fn(params: PyTree, example: PyTree, key: PRNGKeyArray) -> Array:
        draw_key, key = jax.random.split(key)
        image, *label = _as_tuple(example)
        white = jax.random.uniform(draw_key, image.shape, image.dtype) < image
        image = white.astype(image.dtype)
        return loss_fn(params, (image, *label) if label else image, key)

    return redrawn_loss_fn


def _as_tuple(example: PyTree) -> tuple[Any, ...]:
    return example if isinstance(example, tuple) else (example,)


def logistic_regression(latents: PyTree, example: PyTree) -> Float[Array, ""]:
    """Returns log p(y | x) of a logistic regression.

    Args:
        latents: `{"weights": (inputs,), "bias": ()}`, the latents of `global_elbo`.
        example: `(x, y)` with x `(inputs,)` and y 0 or 1.

    Returns:
        A scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> latents = {"weights": jnp.zeros(2), "bias": jnp.zeros(())}
        >>> logistic_regression(latents, (jnp.ones(2), jnp.ones(())))
        Array(-0.6931472, dtype=float32)
    """
    x, y = example
    logit = x @ latents["weights"] + latents["bias"]
    return -optax.sigmoid_binary_cross_entropy(logit, y)


def hierarchical_logistic_regression(
    *, num_nodes: int = 15
) -> Callable[[Array, PyTree], Float[Array, ""]]:
    """Returns the log-likelihood of a hierarchical logistic regression with group features.

        w ~ N(M g, I),   y ~ Bernoulli(logistic(w . x))

    The group weights w are integrated out for every example by Gauss-Hermite quadrature along x. So
    M is the only latent, and no two examples depend on each other.

    Args:
        num_nodes: number of nodes of the quadrature.

    Returns:
        `log_likelihood(M, (x, g, y))` with M `(inputs, features)`.

    Raises:
        TypeError: `num_nodes` is not a whole number.
        ValueError: `num_nodes` is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> log_likelihood = hierarchical_logistic_regression()
        >>> value = log_likelihood(jnp.zeros((5, 3)), (jnp.ones(5), jnp.ones(3), jnp.ones(())))
        >>> round(float(value), 5)  # log 1/2
        -0.69315

    Reference: Prediger et al. 2022, arXiv:2103.11648, section 5, for the model.
    """
    count = _validate.count("num_nodes", num_nodes)
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    # The weights sum to sqrt(2 pi); those of an average sum to one.
    log_weights = jnp.asarray(np.log(weights / weights.sum()), jnp.float32)

    def log_likelihood(latent: Array, example: PyTree) -> Array:
        x, features, y = example
        # w . x is normal with mean (M g) . x and standard deviation ||x||: one dimension is enough.
        along = jnp.sqrt(jnp.sum(x**2)) * jnp.asarray(nodes, x.dtype)
        logits = x @ latent @ features + along
        return jax.nn.logsumexp(jax.nn.log_sigmoid((2 * y - 1) * logits) + log_weights)

    return log_likelihood
