"""Batches under the names of `d3p.minibatch`, drawn by `dpoptax.samplers`.

Each function returns a pair of functions. `init(rng_key)` returns the number of batches in one
epoch, rounded down, and a state. `get_batch(i, state)` returns batch number i. Call `init` with a
new key for every epoch: with the same state, `get_batch` returns the same batches again.
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import scipy.stats
from jaxtyping import Array

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.compat.d3p import random as strong_rng
from dpoptax.compat.d3p._laws import DrawnExamples, record
from dpoptax.compat.d3p._suites import as_key, check_suite
from dpoptax.samplers import FixedSize, MaskedExamples, Poisson, Sampler, Shuffled, take
from dpoptax.samplers._binomial import default_max_batch_size

__all__ = [
    "batch_size_to_q",
    "poisson_batchify_data",
    "q_to_batch_size",
    "split_batchify_data",
    "subsample_batchify_data",
]


def __dir__() -> list[str]:
    return __all__


Init = Callable[..., tuple[int, Any]]


def q_to_batch_size(q: float, num_examples: int) -> int:
    """Returns the batch size nearest to a sampling rate, at least 1; d3p rounds down.

    Args:
        q: sampling rate, above 0 and at most 1.
        num_examples: how many examples there are.

    Returns:
        A number of examples.

    Raises:
        ValueError: `q` or `num_examples` is out of range.

    Example:
        >>> q_to_batch_size(0.29, 100)
        29
    """
    if not 0 < _validate.real("q", q) <= 1:
        raise ValueError(
            f"q is a sampling rate, above 0 and at most 1; got {_validate.described(q)}. For a "
            "batch of b examples pass q = b / num_examples."
        )
    return max(1, round(q * _validate.num_examples(num_examples)))


def batch_size_to_q(batch_size: int, num_examples: int) -> float:
    """Returns the sampling rate of a batch size.

    Args:
        batch_size: how many examples a batch has.
        num_examples: how many examples there are.

    Returns:
        The batch size divided by the number of examples.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> batch_size_to_q(29, 100)
        0.29
    """
    num_examples = _validate.num_examples(num_examples)
    return _validate.whole_batch_size("batch_size", batch_size, num_examples) / num_examples


def subsample_batchify_data(
    dataset: tuple[Any, ...],
    batch_size: int | None = None,
    q: float | None = None,
    with_replacement: bool = False,
    rng_suite: Any = strong_rng,
    return_mask: bool = False,
) -> tuple[Init, Callable[[Any, Any], Any]]:
    """Draws batches of a fixed size without replacement, by `dpoptax.samplers.FixedSize`.

    One example more in the data displaces another one from the batch, so these batches cost more
    than Poisson batches of the same rate.

    Args:
        dataset: arrays with a leading axis of examples.
        batch_size: how many examples a batch has. Give either this or `q`.
        q: the batch size divided by the number of examples.
        with_replacement: only False. An example that is in a batch twice moves the sum twice, and
            the accounting of d3p does not say so.
        rng_suite: `dpoptax.compat.d3p.random`; the type of the key decides which generator draws.
        return_mask: whether `get_batch` also returns a mask, which is True everywhere.

    Returns:
        `init(rng_key) -> (num_batches, state)` and `get_batch(i, state) -> batch`, or
        `(batch, mask)`.

    Raises:
        TypeError: both or neither of `batch_size` and `q`, or another `rng_suite`.
        ValueError: a number out of range, or `with_replacement`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> init, get_batch = subsample_batchify_data((jnp.arange(100),), batch_size=10)
        >>> num_batches, state = init(jax.random.key(0))
        >>> num_batches, get_batch(3, state)[0].shape
        (10, (10,))
    """
    check_suite(rng_suite)
    if with_replacement:
        raise ValueError(
            "with_replacement=True draws an example several times into one batch, for which no "
            "epsilon is known here. Leave it out, or take poisson_batchify_data."
        )
    count, size = _count_and_size(dataset, batch_size, q)
    sampler = FixedSize(count, size)

    def init(rng_key: Any) -> tuple[int, Any]:
        return count // sampler.max_batch_size, sampler.init(as_key(rng_key))

    def get_batch(i: Any, state: Any) -> Any:
        return _whole_batch(dataset, sampler, sampler, i, state, return_mask)

    return init, get_batch


def split_batchify_data(
    dataset: tuple[Any, ...],
    batch_size: int | None = None,
    q: float | None = None,
    rng_suite: Any = strong_rng,
    return_mask: bool = False,
) -> tuple[Init, Callable[[Any, Any], Any]]:
    """Shuffles the data and splits them into batches of one size; some may be left out.

    Meant for test data. Training on such batches is accounted as one Gaussian release per epoch,
    without amplification by sampling: see `dpoptax.samplers.Shuffled`.

    Args:
        dataset: arrays with a leading axis of examples.
        batch_size: how many examples a batch has. Give either this or `q`.
        q: the batch size divided by the number of examples.
        rng_suite: as in `subsample_batchify_data`.
        return_mask: as in `subsample_batchify_data`.

    Returns:
        `init(rng_key) -> (num_batches, state)` and `get_batch(i, state) -> batch`, or
        `(batch, mask)`, for i below `num_batches`.

    Raises:
        TypeError: both or neither of `batch_size` and `q`, or another `rng_suite`.
        ValueError: a number out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> init, get_batch = split_batchify_data((jnp.arange(6),), batch_size=3)
        >>> num_batches, state = init(jax.random.key(0))
        >>> sorted(row for i in range(num_batches) for row in get_batch(i, state)[0].tolist())
        [0, 1, 2, 3, 4, 5]
    """
    check_suite(rng_suite)
    count, size = _count_and_size(dataset, batch_size, q)
    sampler = Shuffled(count, size)
    # An epoch has only whole batches, so that it ends sooner than that of the sampler.
    law = Shuffled(count // size * size, size)

    def init(rng_key: Any) -> tuple[int, Any]:
        return count // size, sampler.init(as_key(rng_key))

    def get_batch(i: Any, state: Any) -> Any:
        return _whole_batch(dataset, sampler, law, i, state, return_mask)

    return init, get_batch


def poisson_batchify_data(
    dataset: tuple[Any, ...],
    q: float,
    max_batch_size: int | float | None = None,
    handle_oversized_batch: Literal["truncate", "suppress"] = "truncate",
    rng_suite: Any = strong_rng,
) -> tuple[Init, Callable[[Any, Any], tuple[MaskedExamples, Array]]]:
    """Draws batches that each example joins with probability q, by `dpoptax.samplers.Poisson`.

    Args:
        dataset: arrays with a leading axis of examples.
        q: sampling rate, above 0 and at most 1.
        max_batch_size: the padded size of every batch. A probability below 1, such as 0.99, asks
            for room for that part of the batches; more room is left, so that no batch is too large
            and the epsilon of q holds. A whole number is taken as it is. The default is a size that
            batches almost never exceed.
        handle_oversized_batch: what d3p does with a batch above `max_batch_size`. Here it is drawn
            again in any case, which costs epsilon; see `Poisson`.
        rng_suite: as in `subsample_batchify_data`.

    Returns:
        `init(rng_key) -> (num_batches, state)` and `get_batch(i, state) -> (batch, mask)`. The mask
        is True for real examples and False for padding. `batch` is
        `dpoptax.samplers.MaskedExamples`, which holds the mask and the sampler too: pass it to
        `DPSVI.update` as it is, or its columns one by one. `batch.examples` are the arrays.

    Raises:
        TypeError: another `rng_suite`.
        ValueError: a number out of range, or fewer than one expected example in a batch.

    Warns:
        UserWarning: `max_batch_size` is so small that batches are drawn again.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> init, get_batch = poisson_batchify_data((jnp.arange(100),), q=0.1, max_batch_size=40)
        >>> num_batches, state = init(jax.random.key(0))
        >>> batch, mask = get_batch(0, state)
        >>> num_batches, batch.examples[0].shape, mask.shape
        (10, (40,), (40,))
    """
    check_suite(rng_suite)
    if handle_oversized_batch not in ("truncate", "suppress"):
        raise ValueError(
            "handle_oversized_batch must be 'truncate' or 'suppress'; got "
            f"{_validate.described(handle_oversized_batch)}. Leave it out."
        )
    count = _validate.leading_axis_size("dataset", dataset)
    size = q_to_batch_size(q, count)
    if q * count < 1:
        raise ValueError(
            f"a batch must have at least one example on average; got q={q} of {count} examples. "
            f"Pass at least q={1 / count:g}."
        )
    sampler = Poisson(count, q * count, max_batch_size=_padded_size(count, q, max_batch_size))

    def init(rng_key: Any) -> tuple[int, Any]:
        return count // size, sampler.init(as_key(rng_key))

    def get_batch(i: Any, state: Any) -> tuple[MaskedExamples, Array]:
        _, batch = sampler.sample(state._replace(step=jnp.asarray(i, jnp.int32)))
        return DrawnExamples(take(dataset, batch).examples, batch.mask, sampler), batch.mask

    return init, get_batch


def _count_and_size(dataset: PyTree, batch_size: Any, q: float | None) -> tuple[int, int]:
    if (batch_size is None) == (q is None):
        raise TypeError(
            f"give either batch_size or q; got batch_size={_validate.described(batch_size)}, "
            f"q={_validate.described(q)}. Pass one of the two and leave out the other."
        )
    count = _validate.leading_axis_size("dataset", dataset)
    if q is not None:
        return count, q_to_batch_size(q, count)
    return count, _validate.whole_batch_size("batch_size", batch_size, count)


def _padded_size(count: int, q: float, max_batch_size: int | float | None) -> int | None:
    if max_batch_size is None:
        return None
    enough = default_max_batch_size(count, q)
    if isinstance(max_batch_size, float) and 0 < max_batch_size < 1:
        return min(count, max(enough, int(scipy.stats.poisson(count * q).ppf(max_batch_size))))
    size = _validate.count("max_batch_size", max_batch_size)
    if size < enough:
        warnings.warn(
            f"batches exceed max_batch_size={size} and are drawn again, which costs more epsilon "
            "than q says; DPSVI.get_epsilon includes it. Leave max_batch_size out, or pass at "
            f"least {enough}.",
            UserWarning,
            stacklevel=3,
        )
    return size


def _whole_batch(
    dataset: PyTree, sampler: Sampler, law: Sampler, i: Any, state: Any, return_mask: bool
) -> Any:
    # A draw depends on the key and the step alone, so any batch can be had without the others.
    _, drawn = sampler.sample(state._replace(step=jnp.asarray(i, jnp.int32)))
    batch = take(dataset, drawn).examples
    record(batch, law)
    return (batch, drawn.mask) if return_mask else batch
