"""Exact posteriors of counts given counts with Gaussian noise.

The number of successes is summed over all its values. For several categories, the counts under a
Dirichlet-multinomial prior are independent negative binomial numbers, given their sum N. With the
noise they stay so: each count has a density

    f_k(c) ∝ Γ(c + α_k) / c! θ^c exp(-(y_k - c)² / (2 s²))

and the counts are drawn one after the other from f_k(c) times the probability that the others sum
to the rest, which is a convolution of the other densities. The result does not depend on θ, which
only keeps the numbers in range. Counts further than `REACH` standard deviations from the noisy ones
are left out; under the model they have a probability below 1e-22.
"""

import numpy as np
from scipy import special

REACH = 10.0


def successes_posterior(
    noisy: float, stddev: float, num_examples: int, alpha: float, beta: float
) -> np.ndarray:
    """Returns the probability of every number of successes, 0 to N, given a noisy one.

    Args:
        noisy: the number of successes plus N(0, stddev²).
        stddev: of the noise.
        num_examples: N.
        alpha: of the beta prior of the probability of a success.
        beta: of the same prior.
    """
    successes = np.arange(num_examples + 1.0)
    log_density = special.betaln(successes + alpha, num_examples - successes + beta)
    log_density += _log_choose(num_examples, successes)
    log_density -= (noisy - successes) ** 2 / (2 * stddev**2)
    return _normalized(log_density)


def draw_counts(
    noisy: np.ndarray,
    stddev: float,
    num_examples: int,
    concentration: np.ndarray,
    uniforms: np.ndarray,
) -> np.ndarray:
    """Draws counts that sum to N from their posterior given noisy counts.

    Args:
        noisy: `(categories,)`, each count plus N(0, stddev²).
        stddev: of the noise.
        num_examples: N.
        concentration: `(categories,)`, of the Dirichlet prior.
        uniforms: `(draws, categories)` numbers in [0, 1), which decide the draws.

    Returns:
        `(draws, categories)` whole numbers.

    Raises:
        ValueError: no counts that sum to N are close to the noisy ones.
    """
    windows = [
        _window(value, stddev, num_examples, alpha, concentration.sum())
        for value, alpha in zip(noisy, concentration, strict=True)
    ]
    # rests[k] has the distribution of the sum of the counts from k on.
    rests = [windows[-1]]
    for first, density in reversed(windows[:-1]):
        start, rest = rests[-1]
        total = np.convolve(density, rest)
        rests.append((first + start, total / total.max()))
    rests.reverse()
    left = np.full(len(uniforms), num_examples)
    counts = np.zeros(uniforms.shape, np.int64)
    for k, (first, density) in enumerate(windows[:-1]):
        start, rest = rests[k + 1]
        place = left[:, None] - first - np.arange(len(density)) - start
        inside = (place >= 0) & (place < len(rest))
        weights = density * np.where(inside, rest[np.clip(place, 0, len(rest) - 1)], 0.0)
        sums = np.cumsum(weights, axis=1)
        if not np.all(sums[:, -1] > 0):
            raise ValueError(
                "the noisy counts are further from a sum of num_examples than noise explains. Pass "
                "what release of the same model returned."
            )
        chosen = np.sum(sums <= uniforms[:, k, None] * sums[:, -1:], axis=1)
        counts[:, k] = first + np.minimum(chosen, len(density) - 1)
        left = left - counts[:, k]
    counts[:, -1] = left
    return counts


def _window(
    noisy: float, stddev: float, num_examples: int, alpha: float, total: float
) -> tuple[int, np.ndarray]:
    """Returns the first count of a window around a noisy one, and the densities in it."""
    first = int(np.clip(np.floor(noisy - REACH * stddev), 0, num_examples))
    last = int(np.clip(np.ceil(noisy + REACH * stddev), 0, num_examples))
    counts = np.arange(first, last + 1.0)
    log_density = special.gammaln(counts + alpha) - special.gammaln(counts + 1)
    # With this θ the counts sum to N on average under the prior.
    log_density += counts * (np.log(num_examples) - np.log(num_examples + total))
    log_density -= (noisy - counts) ** 2 / (2 * stddev**2)
    return first, _normalized(log_density)


def _log_choose(total: int, part: np.ndarray) -> np.ndarray:
    logs: np.ndarray = -special.betaln(part + 1, total - part + 1)
    return logs


def _normalized(log_density: np.ndarray) -> np.ndarray:
    density = np.exp(log_density - log_density.max())
    normalized: np.ndarray = density / density.sum()
    return normalized
