"""Release of sufficient statistics: the ledger is charged, then noise is added to their sum.

The statistics of an example take the place of its gradient. A clip rule bounds them and a mechanism
adds the noise, so the guarantee does not rest on how a model computes them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.accounting import Ledger
from dpoptax.clipping import FlatClip
from dpoptax.mechanisms import DiscreteGaussian, Mechanism
from dpoptax.per_example._stacked import as_per_example_grads
from dpoptax.random import derive_key
from dpoptax.random._discrete_gaussian import MAX_BITS
from dpoptax.random._keys import root_key
from dpoptax.training._noise_binding import bind_key

# Of the 32 bits of a sum of counts, the noise may need 16 standard deviations.
NOISE_ROOM = 16
FEWEST_BITS = 4


class NoisyStatistics(NamedTuple):
    """What a conjugate model released. It is private, so you may publish it.

    Attributes:
        values: the noisy sums, in the units that the model documents.
        noise_stddev: the standard deviation of the noise in each number of `values`.
        num_examples: how many examples there are, a public number.
        event: the privacy event that the ledger was charged.

    Example:
        >>> import dpoptax, jax, jax.numpy as jnp
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(100, 100), clip=1.0, noise_multiplier=2.0,
        ...     num_steps=1, delta=1e-5,
        ... )
        >>> model = dpoptax.vi.conjugate.BetaBernoulli()
        >>> noisy = model.release(jnp.ones(100), noise_multiplier=2.0, ledger=plan.ledger())
        >>> noisy.num_examples, round(noisy.noise_stddev, 2)
        (100, 1.0)
    """

    values: Float[Array | np.ndarray, "..."]
    noise_stddev: float
    num_examples: int
    event: dp_accounting.DpEvent


def refuse_other_than_numbers(data: Any) -> None:
    """Raises for texts and objects, which JAX would print."""
    for leaf in data if isinstance(data, tuple) else (data,):
        dtype = np.asarray(leaf).dtype if not hasattr(leaf, "dtype") else leaf.dtype
        if not jnp.issubdtype(dtype, jnp.number) and not jnp.issubdtype(dtype, jnp.bool_):
            raise TypeError(f"data must be arrays of numbers; got the dtype {dtype}.")


def charge_and_release(
    data: PyTree[Shaped[Array, "..."]],
    noisy_sum: Callable[[PRNGKeyArray, PyTree, float], tuple[Array, float]],
    *,
    noise_multiplier: float,
    ledger: Ledger,
    key: PRNGKeyArray | None,
    program: str,
) -> NoisyStatistics:
    """Charges the ledger, and returns what `noisy_sum(key, data, noise_multiplier)` returns.

    The event is that of a Gaussian mechanism whose noise multiplier is relative to what one example
    more moves the sum by. No replacement moves it by more than twice that, so the event is right
    under every neighbouring relation.
    """
    noise = _validate.positive("noise_multiplier", noise_multiplier)
    if not isinstance(ledger, Ledger):
        raise TypeError(
            "ledger must be a dpoptax.accounting.Ledger, which the release is charged to; got "
            f"{_validate.described(ledger)}. Pass plan.ledger()."
        )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((data, key))):
        raise ValueError(
            "release charges the ledger when it is called, and a compiled function may run more "
            "often than it is traced; got traced values. Call release outside of jax.jit, jax.vmap "
            "and jax.grad."
        )
    if ledger.sampler.unit != "example":
        raise ValueError(
            "a release protects the examples that it counts; got a ledger that protects each "
            f"{ledger.sampler.unit}, who may have several. Make one row of each "
            f"{ledger.sampler.unit}, and pass a ledger with the sampler Poisson(number of rows, "
            "...)."
        )
    num_examples = _validate.leading_axis_size("data", data)
    if num_examples != ledger.sampler.num_examples:
        raise ValueError(
            f"data and ledger must have the same number of examples; got {num_examples} rows and a "
            f"ledger for {ledger.sampler.num_examples}. Make the plan for this data set."
        )
    # Two data sets under one key would share their noise, so the noise depends on the data as well.
    noise_key = bind_key(derive_key(root_key(key), "statistics"), data, f"{program} {noise!r}")
    event = dp_accounting.GaussianDpEvent(noise)
    ledger.charge_event(event)
    values, stddev = noisy_sum(noise_key, data, noise)
    return NoisyStatistics(values, stddev, num_examples, event)


def noisy_sum_of_rows(
    key: PRNGKeyArray,
    rows: Float[Array, "examples statistics"],
    bound: float,
    noise_multiplier: float,
    mechanism: Mechanism,
) -> tuple[Float[Array, " statistics"], float]:
    """Returns the sum of rows of norm `bound` at most, with noise, and its standard deviation.

    A longer row is scaled down to the bound, and a row that is not finite is left out.
    """
    clip = FlatClip(bound)
    mechanism.check(clip, noise_multiplier)
    noisy = mechanism.release(key, as_per_example_grads(rows), clip, noise_multiplier, 0)
    return noisy, noise_multiplier * bound


def noisy_counts(
    key: PRNGKeyArray,
    counts: Int[Array, " categories"],
    num_examples: int,
    noise_multiplier: float,
) -> tuple[Float[Array, " categories"], float]:
    """Returns whole numbers with discrete Gaussian noise, and its standard deviation.

    Each example changes one of the numbers by one at most.
    """
    mechanism = DiscreteGaussian(bits=_bits(num_examples, noise_multiplier))
    keys = jax.random.split(key, len(counts))
    noisy = jnp.stack(
        [
            mechanism.release_votes(keys[index], counts[index], noise_multiplier, 0, num_examples)
            for index in range(len(counts))
        ]
    )
    # The grid steps per count are rounded down, so the noise is a little more than asked for.
    return noisy, 2**mechanism.bits / mechanism._steps_per_vote(noise_multiplier, num_examples)


def _bits(num_examples: int, noise_multiplier: float) -> int:
    """Returns the finest grid for which sum and noise fit into 32 bits."""
    # A count takes at most 2**bits / noise_multiplier grid steps.
    room = 2**31 / (num_examples / noise_multiplier + NOISE_ROOM)
    bits = min(int(np.log2(room)), MAX_BITS - 1)
    if bits < FEWEST_BITS:
        raise ValueError(
            f"counts of {num_examples} examples with noise multiplier {noise_multiplier:g} do not "
            "fit into 32 bits. Release them in several parts."
        )
    return bits
