"""Predictive checks: whether data that a model draws look like the data it was fitted to.

A check compares statistics T of replicated data sets with that of the data. T(data) is private, so
it must be released with noise and charged, like any other release. The replicated statistics then
get noise of the same distribution, so that they are comparable: the noise is a part of the check,
and not a reason for it to fail.

Reference: Rubin 1984; Gelman, Meng and Stern 1996, "Posterior predictive assessment of model
fitness via realized discrepancies".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax import _validate
from dpoptax._pytree import PyTree


class PredictiveCheck(NamedTuple):
    """How extreme a statistic is among those of replicated data.

    Attributes:
        observed: the statistic that was checked: released, or that of the data themselves.
        replicated: `(draws, ...)`, the statistics of replicated data, with noise if it has some.
        p_values: for each number of the statistic, the two-sided p-value. With many numbers, some
            are small by chance.
        overall_p_value: the p-value of all numbers together, by the sum of their squared distances
            from the mean of the replicated ones, in units of their standard deviation.
    """

    observed: Array
    replicated: Array
    p_values: Array
    overall_p_value: float


def predictive_check(
    released: Float[Array, "..."],
    replicated: PyTree,
    statistic: Callable[[PyTree], Float[Array, "..."]],
    key: PRNGKeyArray,
    *,
    noise_stddev: float,
) -> PredictiveCheck:
    """Checks a model against a private statistic of the data, which was released with noise.

    It touches no private data, so it costs nothing beyond the release. Buy the statistic first, for
    example by `dpoptax.mechanisms.norm_histogram`, and charge it to the ledger of the run.

    Args:
        released: the statistic of the private data, plus normal noise.
        replicated: data sets from the posterior or prior predictive: a tree of arrays with a
            leading axis of draws, and as many rows as the private data.
        statistic: `statistic(data_set)`, what was released, without its noise.
        key: a typed key for the noise of the replicated statistics.
        noise_stddev: standard deviation of the noise in each number of `released`. That of a
            histogram is its noise multiplier.

    Returns:
        A `PredictiveCheck`. Small p-values say that the model does not fit. It is as private as
        `released` and the parameters.

    Raises:
        TypeError: an old-style key.
        ValueError: a statistic of another shape than `released`, fewer than two draws, or negative
            noise.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from dpoptax.mechanisms import norm_histogram
        >>> edges = (0.0, 1.0, 2.0)
        >>> counts = lambda y: jnp.histogram(jnp.abs(y), jnp.array([*edges, jnp.inf]))[0]
        >>> y = 3 * jax.random.normal(jax.random.key(0), (500,))  # private; the model says scale 1
        >>> released = norm_histogram({"y": y}, edges, 5.0, jax.random.key(1))
        >>> replicated = jax.random.normal(jax.random.key(2), (200, 500))
        >>> check = predictive_check(released, replicated, counts, jax.random.key(3),
        ...                          noise_stddev=5.0)
        >>> check.overall_p_value < 0.01
        True

    Reference: Gelman, Meng and Stern 1996, "Posterior predictive assessment of model fitness via
    realized discrepancies".
    """
    stddev = _validate.non_negative("noise_stddev", noise_stddev)
    key = _validate.typed_key("key", key)
    exact = _replicated_statistics(replicated, statistic)
    noisy = exact + stddev * jax.random.normal(key, exact.shape, exact.dtype)
    return _compare(jnp.asarray(released), noisy)


def nonprivate_predictive_check(
    nonprivate_observed: PyTree,
    replicated: PyTree,
    statistic: Callable[[PyTree], Float[Array, "..."]],
) -> PredictiveCheck:
    """Checks a model against data without privacy: for your own eyes, or for public data.

    The result is not private, p-values included: it depends on the data without noise.

    Args:
        nonprivate_observed: the data.
        replicated: as in `predictive_check`.
        statistic: as in `predictive_check`.

    Returns:
        A `PredictiveCheck` that must not be released if the data are private.

    Raises:
        ValueError: fewer than two draws, or statistics of different shapes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> y = jnp.linspace(-2.0, 2.0, 100)
        >>> replicated = jax.random.normal(jax.random.key(0), (200, 100))
        >>> check = nonprivate_predictive_check(y, replicated, jnp.mean)
        >>> check.overall_p_value > 0.5
        True

    Reference: Rubin 1984, "Bayesianly justifiable and relevant frequency calculations".
    """
    observed = jnp.asarray(statistic(nonprivate_observed), jnp.float32)
    return _compare(observed, _replicated_statistics(replicated, statistic))


def _replicated_statistics(replicated: PyTree, statistic: Callable[[PyTree], Any]) -> Array:
    if _validate.leading_axis_size("replicated", replicated) < 2:
        raise ValueError(
            "a check needs at least two replicated data sets, on the leading axis; got one. Draw "
            "for example 1000."
        )
    return jnp.asarray(jax.vmap(statistic)(replicated), jnp.float32)


def _compare(observed: Array, replicated: Array) -> PredictiveCheck:
    if observed.shape != replicated.shape[1:]:
        raise ValueError(
            f"the statistic of a replicated data set has shape {replicated.shape[1:]}; expected "
            f"that of the observed one, {observed.shape}. Compute the same on both."
        )
    draws, seen = np.asarray(replicated, np.float64), np.asarray(observed, np.float64)
    # Ties count half, as for counts; the observed statistic is one more draw, so that no p is 0.
    above = (draws > seen).sum(axis=0) + 0.5 * (draws == seen).sum(axis=0)
    upper = (above + 0.5) / (len(draws) + 1)
    everything = np.concatenate([seen[None], draws])
    spread = everything.std(axis=0)
    # The observed statistic counts in mean and spread, so that all draws are treated the same.
    distance = (everything - everything.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    total = (distance**2).reshape(len(everything), -1).sum(axis=1)
    return PredictiveCheck(
        observed=observed,
        replicated=replicated,
        p_values=jnp.asarray(2 * np.minimum(upper, 1 - upper), jnp.float32),
        overall_p_value=float((total >= total[0]).mean()),
    )
