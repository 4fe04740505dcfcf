"""Private principal components, and a linear decoder that follows from them.

One noisy sum over all images gives their second moments. Mean, principal components and a linear
decoder of Bernoulli pixels follow from it without another look at the images. So training starts
near a linear model, and few parameters are left to train.

References: Dwork, Talwar, Thakurta and Zhang 2014, "Analyze Gauss", for noisy second moments.
Fisher 1936 for the linear discriminant of each pixel.
"""

from typing import Any, NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import brentq

import dpoptax
from leaderboard.recipe import finished


class Components(NamedTuple):
    """What follows from the second moments of images with `pixels` pixels.

    Attributes:
        whiten: `(pixels, count)`; an image times this, minus `offset`, has uncorrelated entries of
            variance 1, by decreasing variance of the component.
        offset: `(count,)`.
        basis: `(pixels, count)`, the components, of norm 1.
        loadings: `(latent, pixels)`; with `bias`, the logits of a pixel given the first entries.
        bias: `(pixels,)`.
    """

    whiten: jax.Array
    offset: jax.Array
    basis: jax.Array
    loadings: jax.Array
    bias: jax.Array


def split_budget(
    epsilon: float, share: float, num_examples: int, batch: int, num_steps: int, delta: float
) -> tuple[float, float]:
    """Returns noise multipliers of the moments and of the training that cost `epsilon` together.

    Args:
        epsilon: the budget; infinite for no noise at all.
        share: of the squared budget, for the moments.
        num_examples: of the private data.
        batch: expected batch size of the training, with Poisson sampling.
        num_steps: of the training.
        delta: of both together.
    """
    if np.isinf(epsilon):
        return 0.0, 0.0
    everything = dpoptax.samplers.Poisson(num_examples, num_examples)
    least, _ = dpoptax.accounting.calibrate_noise_multiplier(
        epsilon=epsilon, delta=delta, sampler=everything, num_steps=1
    )
    moments = float(least / np.sqrt(share))

    def excess(noise: float) -> float:
        return together(moments, noise, num_examples, batch, num_steps, delta) - epsilon

    # The guess is right for a small sampling rate and much noise.
    guess = least / np.sqrt(1 - share) * np.sqrt(num_steps) * batch / num_examples
    noise = brentq(excess, 0.6 * guess + 0.2, 2 * guess + 1, rtol=1e-3)
    return moments, float(1.002 * noise)  # above the root, whichever side the search ended on


def together(
    moments: float, noise: float, num_examples: int, batch: int, num_steps: int, delta: float
) -> float:
    """Returns the epsilon of the moments and of the training together."""
    if moments == 0:
        return float("inf")
    # The event of the plan that runs: a plan has smaller batches than the sampler it is given.
    training = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(num_examples, batch),
        clip=1.0,
        noise_multiplier=noise,
        num_steps=num_steps,
        delta=delta,
    ).event()
    event = dp_accounting.ComposedDpEvent([dp_accounting.GaussianDpEvent(moments), training])
    return dpoptax.accounting.event_epsilon(event, delta=delta)


def cosines(side: int, low: int) -> np.ndarray:
    """The `low`**2 smoothest cosine functions on an image of side * side, as orthonormal columns.

    Strokes are some pixels wide, so handwriting has few faster oscillations. This is known without
    the data.
    """
    waves = np.cos(np.pi * np.outer(np.arange(side) + 0.5, np.arange(low)) / side)
    waves /= np.linalg.norm(waves, axis=0)
    return np.kron(waves, waves)


def private_components(
    images: np.ndarray, noise_multiplier: float, delta: float, key: Any, *, latent: int, low: int
) -> Components:
    """Releases second moments with noise, and returns what follows from them.

    Args:
        images: `(num_examples, side**2)`, in [0, 1].
        noise_multiplier: of the only release, a Gaussian mechanism of sensitivity 1.
        delta: of the plan.
        key: for the noise.
        latent: how many components the linear decoder uses.
        low: the moments are those of `low`**2 smooth functions.
    """
    num_examples, pixels = images.shape
    waves = cosines(int(np.sqrt(pixels)), low)
    # A constant column carries the mean; each row then gets norm 1, so that its moments have too.
    rows = np.concatenate([images @ waves, np.full((num_examples, 1), 3.0)], axis=1)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    released = dpoptax.training.fit(
        lambda moments, row: -(row @ moments @ row),
        jnp.zeros((rows.shape[1], rows.shape[1])),
        rows.astype(np.float32),
        plan=dpoptax.Plan(
            sampler=dpoptax.samplers.Poisson(num_examples, num_examples),
            clip=1.0,
            noise_multiplier=noise_multiplier,
            num_steps=1,
            delta=delta,
        ),
        optimizer=optax.sgd(1.0),
        key=key,
        progress=False,
    )
    moments = np.asarray(finished(released).params, np.float64)
    moments = (moments + moments.T) / 2
    mean = moments[:-1, -1] / moments[-1, -1] * 3
    covariance = moments[:-1, :-1] / moments[-1, -1] * 9 - np.outer(mean, mean)
    variances, vectors = np.linalg.eigh(covariance)
    spread = np.sqrt(np.maximum(variances[::-1], 1e-3))
    basis = waves @ vectors[:, ::-1]
    # The latents are normal only roughly, so the discriminants of the full covariances overshoot.
    loadings, bias = discriminants(waves @ mean, 0.85 * basis[:, :latent] * spread[:latent])
    found = (basis / spread, waves @ mean @ (basis / spread), basis, loadings.T, bias)
    return Components(*(jnp.asarray(each, jnp.float32) for each in found))


def discriminants(mean: np.ndarray, covariances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fisher's discriminant of each pixel, white against black, given standard normal latents.

    Args:
        mean: `(pixels,)`, how often each pixel is white.
        covariances: `(pixels, latent)`, of pixels with latents.

    Returns:
        The weights `(pixels, latent)` and the biases `(pixels,)` of the logits.
    """
    white = np.clip(mean, 0.01, 0.99)
    variance = white * (1 - white)
    explained = (covariances**2).sum(axis=1) / variance
    limit = np.minimum(explained, 0.8)  # noise may explain more than all
    explained, covariances = (
        limit,
        covariances * np.sqrt(limit / np.maximum(explained, 1e-9))[:, None],
    )
    weights = covariances / variance[:, None] / (1 - explained)[:, None]
    # Half the difference of the Mahalanobis norms of the latents' means for white and for black.
    norms = explained / variance / (1 - explained)
    bias = np.log(white / (1 - white)) - 0.5 * ((1 - white) ** 2 - white**2) * norms
    return weights, bias
