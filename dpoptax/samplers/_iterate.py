"""Iterate over the batches of a sampler on the host, for data that no device holds."""

from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from dpoptax.samplers._base import Batch, Sampler


def iterate_batches(sampler: Sampler, key: PRNGKeyArray, *, step: int = 0) -> Iterator[Batch]:
    """Yields the batches of `sampler` from number `step` on, as numpy arrays, without end.

    These are the batches that the sampler draws on the device. A run that resumes passes the
    number of its next step and gets the same batches as before, without a replay.

    Args:
        sampler: one of `dpoptax.samplers`.
        key: a key for sampling and nothing else.
        step: the number of the first batch.

    Returns:
        An iterator of `Batch`, of static shape. `take(data, batch)` reads its rows from NumPy
        arrays or memory maps. If you read them yourself, read only the rows where `mask` is True,
        and pass the mask with them: `MaskedExamples(rows, batch.mask)`.

    Raises:
        TypeError: a key that is not a typed Threefry or ChaCha key.
        ValueError: a negative step.

    Example:
        >>> import jax, itertools
        >>> from dpoptax.samplers import Poisson
        >>> batches = iterate_batches(Poisson(1000, 20), jax.random.key(0))
        >>> first, second = itertools.islice(batches, 2)
        >>> resumed = next(iterate_batches(Poisson(1000, 20), jax.random.key(0), step=1))
        >>> bool((resumed.indices == second.indices).all())
        True
    """
    state = sampler.init(key, step)
    sample = jax.jit(sampler.sample)
    while True:
        state, batch = sample(state)
        yield jax.tree.map(np.asarray, batch)
