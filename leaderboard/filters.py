"""Filters of a first layer that are computed from a formula, and a normalization of its channels.

Neither reads data, so they cost no privacy. A network that starts with edge detectors needs fewer
steps, and so less noise, than one that has to find them.

Reference: Gabor 1946, "Theory of communication", for the filters; Wu and He 2018, arXiv:1803.08494,
for group normalization, which normalizes each image on its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WIDTH, SLANT, FREQUENCY = 1.6, 0.6, 1.2


def gabor_filters(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Returns waves under a Gaussian, at equally spaced angles: an initializer for `flax.linen`.

    Args:
        key: not used, as nothing is random.
        shape: `(size, size, 1, 2 * angles)`. Each angle has an even and an odd wave.
        dtype: of the filters.
    """
    size, _, _, count = shape
    place = np.arange(size) - (size - 1) / 2
    rows, columns = np.meshgrid(place, place, indexing="ij")
    found = []
    for angle in np.arange(count // 2) * 2 * np.pi / count:
        along = rows * np.cos(angle) + columns * np.sin(angle)
        across = columns * np.cos(angle) - rows * np.sin(angle)
        envelope = np.exp(-(along**2 + (SLANT * across) ** 2) / (2 * WIDTH**2))
        for wave in (np.cos(FREQUENCY * along), np.sin(FREQUENCY * along)):
            # The mean of a filter is zero, and the sum of its absolute values is 2.
            cut = envelope * (wave - (envelope * wave).sum() / envelope.sum())
            found.append(2 * cut / np.abs(cut).sum())
    return jnp.asarray(np.stack(found, axis=-1)[:, :, None], dtype)


def group_normalized(values: jax.Array, groups: int) -> jax.Array:
    """Returns the channels of one image, each group with mean 0 and variance 1.

    Args:
        values: `(..., height, width, channels)`.
        groups: how many groups the channels form.
    """
    grouped = values.reshape(*values.shape[:-1], groups, -1)
    mean = grouped.mean(axis=(-4, -3, -1), keepdims=True)
    variance = grouped.var(axis=(-4, -3, -1), keepdims=True)
    return ((grouped - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(values.shape)
