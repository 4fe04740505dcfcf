"""The names that d3p scripts import: batches of `d3p.minibatch`, made by `dpoptax.samplers`.

Each function returns a pair of functions. `init(key)` returns the number of batches in one epoch,
rounded down, and a state. `get_batch(i, state)` returns batch number i. To compute epsilon, use the
sampler that the docstring names. New code should use `dpoptax.samplers` directly.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, PRNGKeyArray

from dpoptax import _validate
from dpoptax.samplers import FixedSize, MaskedExamples, Poisson, take

__all__ = ["poisson_batchify_data", "q_to_batch_size", "subsample_batchify_data"]


def __dir__() -> list[str]:
    return __all__


Init = Callable[[PRNGKeyArray], tuple[int, Any]]


def q_to_batch_size(q: float, num_examples: int) -> int:
    """Returns the batch size nearest to a sampling rate, at least 1.

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


def subsample_batchify_data(
    dataset: tuple[Array, ...], batch_size: int | None = None, q: float | None = None
) -> tuple[Init, Callable[[Any, Any], tuple[Array, ...]]]:
    """Draws batches of a fixed size without replacement, by `dpoptax.samplers.FixedSize`.

    Args:
        dataset: arrays with a leading axis of examples.
        batch_size: how many examples a batch has. Give either this or `q`.
        q: the batch size divided by the number of examples.

    Returns:
        `init(key) -> (num_batches, state)` and `get_batch(i, state) -> batch`.

    Raises:
        TypeError: both or neither of `batch_size` and `q`.
        ValueError: a number out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> init, get_batch = subsample_batchify_data((jnp.arange(100),), batch_size=10)
        >>> num_batches, state = init(jax.random.key(0))
        >>> num_batches, get_batch(3, state)[0].shape
        (10, (10,))
    """
    if (batch_size is None) == (q is None):
        raise TypeError(
            f"give either batch_size or q; got batch_size={_validate.described(batch_size)}, "
            f"q={_validate.described(q)}. Pass one of the two and leave out the other."
        )
    count = _validate.leading_axis_size("dataset", dataset)
    size = q_to_batch_size(q, count) if q is not None else batch_size
    sampler = FixedSize(count, size)  # type: ignore[arg-type]

    def init(key: PRNGKeyArray) -> tuple[int, Any]:
        return count // sampler.max_batch_size, sampler.init(key)

    def get_batch(i: Any, state: Any) -> tuple[Array, ...]:
        # A draw depends on the key and the step alone, so any batch can be had without the others.
        _, batch = sampler.sample(state._replace(step=jnp.asarray(i, jnp.int32)))
        # Batches of a fixed size have no padding, so their mask says nothing.
        taken: tuple[Array, ...] = take(dataset, batch).examples
        return taken

    return init, get_batch


def poisson_batchify_data(
    dataset: tuple[Array, ...], q: float, max_batch_size: int | None = None
) -> tuple[Init, Callable[[Any, Any], tuple[MaskedExamples, Bool[Array, " batch"]]]]:
    """Draws batches that each example joins with probability q, by `dpoptax.samplers.Poisson`.

    Args:
        dataset: arrays with a leading axis of examples.
        q: sampling rate, above 0 and at most 1.
        max_batch_size: the padded size of every batch. Larger batches are drawn again, which costs
            epsilon; see `Poisson`. By default a size that batches almost never exceed.

    Returns:
        `init(key) -> (num_batches, state)` and `get_batch(i, state) -> (batch, mask)`. The mask is
        True for real examples and False for padding. `batch` is `dpoptax.samplers.MaskedExamples`,
        which holds the mask too, so you can pass it to `DPSVI.update` as it is.

    Raises:
        ValueError: a number out of range, or fewer than one expected example in a batch.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> init, get_batch = poisson_batchify_data((jnp.arange(100),), q=0.1, max_batch_size=40)
        >>> num_batches, state = init(jax.random.key(0))
        >>> batch, mask = get_batch(0, state)
        >>> num_batches, batch.examples[0].shape, mask.shape
        (10, (40,), (40,))
    """
    count = _validate.leading_axis_size("dataset", dataset)
    size = q_to_batch_size(q, count)
    if q * count < 1:
        raise ValueError(
            f"a batch must have at least one example on average; got q={q} of {count} examples. "
            f"Pass at least q={1 / count:g}."
        )
    sampler = Poisson(count, q * count, max_batch_size=max_batch_size)

    def init(key: PRNGKeyArray) -> tuple[int, Any]:
        return count // size, sampler.init(key)

    def get_batch(i: Any, state: Any) -> tuple[MaskedExamples, Array]:
        _, batch = sampler.sample(state._replace(step=jnp.asarray(i, jnp.int32)))
        return take(dataset, batch), batch.mask

    return init, get_batch
