"""Arguments in, checked arguments out: one refusal per kind of mistake, each with its remedy."""

import fractions
import math
import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp


def real(name: str, value: Any) -> float:
    """Returns `value` as a Python float; refuses what is no concrete real number."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} must be known before the program is traced; got a traced value. "
            "It is part of the privacy statement: pass a Python number."
        )
    if isinstance(value, bool) or not (
        isinstance(value, numbers.Real) or (hasattr(value, "ndim") and value.ndim == 0)
    ):
        raise TypeError(f"{name} must be a real number; got {value!r}.")
    result = float(value)
    if math.isnan(result):
        raise ValueError(f"{name} must be a number; got nan.")
    return result


def positive(name: str, value: Any) -> float:
    """Returns `value` as a finite float above zero."""
    result = real(name, value)
    if not 0 < result < math.inf:
        raise ValueError(f"{name} must be positive and finite; got {result}.")
    return result


def non_negative(name: str, value: Any) -> float:
    """Returns `value` as a finite float of zero or more."""
    result = real(name, value)
    if not 0 <= result < math.inf:
        raise ValueError(f"{name} must be zero or more, and finite; got {result}.")
    return result


def count(name: str, value: Any, *, at_least: int = 1) -> int:
    """Returns `value` as a Python int; numpy and JAX integers pass, floats do not."""
    try:
        result = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number; got {value!r}.") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number; got {value!r}.")
    if result < at_least:
        raise ValueError(f"{name} must be at least {at_least}; got {result}.")
    return result


def num_examples(value: Any) -> int:
    """Returns how many examples there are, as a Python int that int32 indices can address."""
    result = count("num_examples", value)
    if result > 2**31:
        raise ValueError(f"num_examples must be at most 2**31; got {result}.")
    return result


def size_of_batch(name: str, value: Any, num_examples: int) -> float:
    """Returns a number of examples from 1 to num_examples; refuses what looks like a rate."""
    result = positive(name, value)
    if result < 1:
        raise ValueError(
            f"{name} is a number of examples, at least 1; got {result}. For a sampling rate of "
            f"{result} pass {result} * num_examples = {result * num_examples:g}."
        )
    if result > num_examples:
        raise ValueError(f"{name} cannot exceed num_examples; got {result:g} of {num_examples}.")
    return result


def whole_size_of_batch(name: str, value: Any, num_examples: int) -> int:
    """Returns a whole number of examples from 1 to num_examples."""
    size_of_batch(name, value, num_examples)
    return count(name, value)


def epochs_or_steps(epochs: Any, num_steps: Any) -> None:
    """Refuses both lengths of a run, and none."""
    if (epochs is None) == (num_steps is None):
        raise TypeError(
            f"give either epochs or num_steps; got epochs={epochs}, num_steps={num_steps}."
        )


def steps_of_epochs(epochs: Any, num_examples: int, batch_size: float) -> int:
    """Returns how many batches make `epochs` passes, rounded up.

    Exact: in floating point a ceiling or a floor can be one step off.
    """
    passes = fractions.Fraction(str(positive("epochs", epochs)))
    return math.ceil(passes * num_examples / fractions.Fraction(str(batch_size)))


def open_unit(name: str, value: Any) -> float:
    """Returns `value` as a float strictly between 0 and 1, as a delta must be."""
    result = real(name, value)
    if not 0 < result < 1:
        raise ValueError(
            f"{name} must lie strictly between 0 and 1; got {result}. "
            "A usual choice is 1 / (10 * num_examples)."
        )
    return result


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed PRNG keys."""
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def typed_key(name: str, key: Any) -> jax.Array:
    """Returns `key` if it is one typed PRNG key; refuses integers and old-style uint32 keys."""
    if not isinstance(key, jax.Array):
        raise TypeError(
            f"{name} must be a typed PRNG key such as jax.random.key(seed); got {key!r}."
        )
    if not is_key(key):
        raise TypeError(
            f"{name} must be a typed PRNG key; got an array of {key.dtype} with shape {key.shape}. "
            "Make it with jax.random.key(seed), or wrap old key data with "
            "jax.random.wrap_key_data(data)."
        )
    if key.shape != ():
        raise ValueError(f"{name} must be one key; got an array of keys of shape {key.shape}.")
    return key


def batch_size(name: str, tree: Any) -> int:
    """Returns the length of the leading axis that all leaves of `tree` share."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ValueError(f"{name} has no arrays; expected at least one with a leading batch axis.")
    sizes: dict[str, int] = {}
    for path, leaf in leaves:
        label = name + jax.tree_util.keystr(path)
        if jnp.ndim(leaf) == 0:
            raise ValueError(
                f"{label} is a scalar; every leaf of {name} needs a leading batch axis."
            )
        sizes[label] = jnp.shape(leaf)[0]
    if len(set(sizes.values())) > 1:
        listing = ", ".join(f"{label}: {size}" for label, size in sizes.items())
        raise ValueError(f"the leaves of {name} must share one leading batch axis; got {listing}.")
    return next(iter(sizes.values()))
