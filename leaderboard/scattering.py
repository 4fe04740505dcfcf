"""Scattering features: averages of wavelet coefficients, which nothing is learnt for.

S_0, S_1 and S_2 of Oyallon and Mallat 2015 with two scales and eight angles: the image, the modulus
of its wavelet transform, and the modulus of the wavelet transform of that, each averaged over
windows. An image of 28 x 28 pixels gives 81 channels of 7 x 7. The features of an image depend on
this image alone, so they cost no privacy. Filters and padding are those of Kymatio.

Reference: Tramer and Boneh 2021, arXiv:2011.11660, use them for private learning.
"""

import functools
import hashlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

SCALES, ANGLES = 2, 8
CHANNELS = 1 + SCALES * ANGLES + ANGLES**2  # a second wavelet is coarser than the first one
STEP = 2**SCALES  # pixels between two windows
CACHE = pathlib.Path(__file__).parents[1] / "out" / "features"


def features(images: np.ndarray, *, groups: int = 27) -> np.ndarray:
    """Returns the normalized scattering features of some images, and keeps them on disk.

    Args:
        images: `(batch, side, side)`; the side is a multiple of 4.
        groups: how many groups of channels are normalized, each to mean 0 and variance 1 within one
            image. This uses no statistics of the data.

    Returns:
        float16 `(batch, side / 4, side / 4, 81)`.
    """
    name = hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()[:16]
    path = CACHE / f"scattering-{images.shape[1]}-{groups}-{name}.npy"
    if path.exists():
        return np.load(path)
    parts = [images[at : at + 500] for at in range(0, len(images), 500)]
    found = np.concatenate([np.asarray(_normalized(part, groups), np.float16) for part in parts])
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft.npy")
    np.save(draft, found)
    draft.replace(path)
    return found


@functools.partial(jax.jit, static_argnums=1)
def _normalized(images: jax.Array, groups: int) -> jax.Array:
    found = scattering(images)
    grouped = found.reshape(*found.shape[:-1], groups, -1)
    mean = grouped.mean(axis=(1, 2, 4), keepdims=True)
    variance = grouped.var(axis=(1, 2, 4), keepdims=True)
    return ((grouped - mean) / jnp.sqrt(variance + 1e-5)).reshape(found.shape)


def scattering(images: jax.Array) -> jax.Array:
    """Returns scattering coefficients, `(batch, side / 4, side / 4, 81)`.

    The images are `(batch, side, side)`. The channels are ordered as in Kymatio: S_0; S_1 by scale
    and angle; S_2 by first and second angle.
    """
    side = images.shape[1]
    margin = STEP
    padded = jnp.pad(images, ((0, 0), (margin, margin), (margin, margin)), mode="reflect")
    size = side + 2 * margin
    fine, coarse = (jnp.asarray(_wavelets(size, scale)) for scale in range(SCALES))
    average = [jnp.asarray(_averaging(size, level)) for level in range(SCALES)]
    spectrum = jnp.fft.fft2(padded)[:, None]
    first_fine = jnp.abs(jnp.fft.ifft2(spectrum * fine))
    first_coarse = jnp.abs(jnp.fft.ifft2(_subsampled(spectrum * coarse)))
    # (batch, first angle, second angle, size / 2, size / 2)
    second = jnp.fft.fft2(first_fine)[:, :, None] * coarse
    second = jnp.abs(jnp.fft.ifft2(_subsampled(second)))
    orders = [
        _windows(padded[:, None], average[0]),
        _windows(first_fine, average[0]),
        _windows(first_coarse, average[1]),
        _windows(second, average[1]).reshape(len(images), ANGLES**2, side // STEP, side // STEP),
    ]
    return jnp.moveaxis(jnp.concatenate(orders, axis=1), 1, -1)


def _windows(values: jax.Array, average: jax.Array) -> jax.Array:
    return jnp.einsum("iu,...uv,jv->...ij", average, values, average)


def _subsampled(spectrum: jax.Array) -> jax.Array:
    """Returns the spectrum of every second pixel: the spectrum folded onto its low frequencies."""
    half = spectrum.shape[-1] // 2
    folded = spectrum.reshape(*spectrum.shape[:-2], 2, half, 2, half)
    return folded.mean(axis=(-4, -2))


@functools.cache
def _wavelets(size: int, scale: int) -> np.ndarray:
    """Returns the spectra of the Morlet wavelets of one scale, complex64 `(angles, size, size)`."""
    sigma, frequency, slant = 0.8 * 2**scale, 0.75 * np.pi / 2**scale, 4 / ANGLES
    found = []
    for number in range(ANGLES):
        angle = (ANGLES // 2 - 1 - number) * np.pi / ANGLES
        wave = _gabor(size, sigma, angle, frequency, slant)
        envelope = _gabor(size, sigma, angle, 0.0, slant)
        # The mean of a wavelet is zero.
        found.append(np.fft.fft2(wave - wave.sum() / envelope.sum() * envelope).real)
    return np.array(found, np.complex64)  # all of them real, for products with spectra


def _gabor(size: int, sigma: float, angle: float, frequency: float, slant: float) -> np.ndarray:
    """Returns a wave under a Gaussian, summed over periods, `(size, size)`."""
    place = np.arange(-2 * size, 3 * size)
    rows, columns = np.meshgrid(place, place, indexing="ij")
    along = rows * np.cos(angle) + columns * np.sin(angle)
    across = columns * np.cos(angle) - rows * np.sin(angle)
    envelope = np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
    wave = envelope * np.exp(1j * frequency * along) * slant / (2 * np.pi * sigma**2)
    return wave.reshape(5, size, 5, size).sum(axis=(0, 2))


@functools.cache
def _averaging(size: int, level: int) -> np.ndarray:
    """Returns the weights of the windows, float32 `(windows, size / 2**level)`, along one axis.

    Args:
        size: of the padded image.
        level: how often the values were subsampled by two.
    """
    sigma, place = 0.8 * 2 ** (SCALES - 1), np.arange(-2 * size, 3 * size)
    envelope = np.exp(-(place**2) / (2 * sigma**2)) / np.sqrt(2 * np.pi * sigma**2)
    spectrum = np.fft.fft(envelope.reshape(5, size).sum(axis=0)).real
    shorter = size // 2**level
    # A subsampled signal is averaged with the low frequencies of the same window.
    low = np.concatenate([spectrum[: shorter // 2], spectrum[-(shorter - shorter // 2) :]])
    window = np.fft.ifft(low).real
    step = STEP // 2**level
    starts = step * np.arange(1, size // STEP - 1)  # without those in the margin
    return np.array([np.roll(window, start) for start in starts], np.float32)
