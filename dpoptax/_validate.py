"""Argument validation: each function returns the argument in its final type, or raises.

Every error says what was expected, what came, and what to do about it.
"""

import fractions
import inspect
import math
import numbers
import operator
import os
import pathlib
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Text that an error may show: a short word such as "replace_one", or the name of a format.
_NAME = re.compile(r"[\w.:<>-]{1,30}|dpoptax [a-z]{1,20} \d{1,3}", re.ASCII)
_LIBRARY = f"{pathlib.Path(__file__).parent}{os.sep}"


def real(name: str, value: Any) -> float:
    """Returns `value` as a Python float; raises unless it is a concrete real number."""
    # A traced number has no value that the accountant could read.
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} must be known before the program is traced; got a traced value. "
            "It is part of the privacy statement: pass a Python number."
        )
    if isinstance(value, bool) or not (
        isinstance(value, numbers.Real) or (hasattr(value, "ndim") and value.ndim == 0)
    ):
        raise TypeError(
            f"{name} must be a real number; got {described(value)}. Pass one Python number."
        )
    result = float(value)
    if math.isnan(result):
        raise ValueError(f"{name} must be a number; got nan. Check how it was computed.")
    return result


def described(value: Any) -> str:
    """Returns a number or a short name, or else only the type and size of a value.

    The value may be data, a key or a gradient, and a text may come from a file.
    """
    if value is None or isinstance(value, (bool, numbers.Number)):
        return str(value)
    if isinstance(value, str):
        return repr(value) if _NAME.fullmatch(value) else f"a string of {len(value)} characters"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"an array of {value.dtype} with shape {value.shape}"
    if isinstance(value, tuple | list | dict):
        size = len(value)
        return f"a {type(value).__name__} of {size} {'entry' if size == 1 else 'entries'}"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    return f"a value of type {type(value).__name__}"


def positive(name: str, value: Any) -> float:
    """Returns `value` as a finite float above zero."""
    result = real(name, value)
    if not 0 < result < math.inf:
        raise ValueError(
            f"{name} must be positive and finite; got {result}. Pass a number above 0."
        )
    return result


def non_negative(name: str, value: Any) -> float:
    """Returns `value` as a finite float of zero or more."""
    result = real(name, value)
    if not 0 <= result < math.inf:
        raise ValueError(
            f"{name} must be zero or more, and finite; got {result}. Pass a number of at least 0."
        )
    return result


def count(name: str, value: Any, *, at_least: int = 1) -> int:
    """Returns `value` as a Python int; accepts numpy and JAX integers, but no float or bool."""
    try:
        result = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be a whole number; got {described(value)}. Pass an int."
        ) from None
    if isinstance(value, bool):  # a bool has an index, but as a count it is a mistake
        raise TypeError(f"{name} must be a whole number; got {described(value)}. Pass an int.")
    if result < at_least:
        raise ValueError(
            f"{name} must be at least {at_least}; got {result}. Pass {at_least} or more."
        )
    return result


def num_examples(value: Any) -> int:
    """Returns the number of examples as a Python int below 2**31."""
    result = count("num_examples", value)
    # The number itself is an int32 index too: that of padding.
    if result >= 2**31:
        raise ValueError(
            f"num_examples must be below 2**31, because indices are int32; got {result}. Train on "
            "fewer examples."
        )
    return result


def batch_size(name: str, value: Any, num_examples: int | None = None) -> float:
    """Returns a batch size of at least 1 as a float; raises for a sampling rate."""
    result = positive(name, value)
    # Most libraries take a sampling rate here: a number below 1 is surely one.
    if result < 1:
        product = "" if num_examples is None else f" = {result * num_examples:g}"
        raise ValueError(
            f"{name} is a number of examples, at least 1; got {result}. For a sampling rate of "
            f"{result} pass {result} * num_examples{product}."
        )
    return result


def expected_batch_size(name: str, value: Any, num_examples: int) -> float:
    """Returns a batch size from 1 to num_examples as a float; raises for a sampling rate."""
    result = batch_size(name, value, num_examples)
    if result > num_examples:
        raise ValueError(
            f"{name} cannot exceed num_examples; got {result:g} of {num_examples}. Pass at most "
            f"{num_examples}."
        )
    return result


def whole_batch_size(name: str, value: Any, num_examples: int) -> int:
    """Returns a batch size from 1 to num_examples as an int; raises for a sampling rate."""
    expected_batch_size(name, value, num_examples)
    return count(name, value)


def epochs_or_steps(epochs: Any, num_steps: Any) -> None:
    """Raises unless exactly one of the two is given."""
    if (epochs is None) == (num_steps is None):
        raise TypeError(
            f"give either epochs or num_steps; got epochs={described(epochs)}, "
            f"num_steps={described(num_steps)}. Pass one of the two and leave out the other."
        )


def steps_of_epochs(epochs: Any, num_examples: int, batch_size: float) -> int:
    """Returns the number of steps of `epochs` passes over the data, rounded up."""
    # In floating point, 3 * 0.1 * 10 is above 3 and its ceiling is 4. We compute with the decimal
    # numbers that a person typed.
    passes = fractions.Fraction(str(positive("epochs", epochs)))
    return whole_steps(passes * num_examples / fractions.Fraction(str(batch_size)))


def whole_steps(steps: float | fractions.Fraction) -> int:
    """Returns a positive number of steps, rounded up.

    A batch size such as 100 / 7 is rounded to a float. That must not add a step: with `BallsInBins`
    it would begin another epoch, which costs as much as a whole one.
    """
    return max(1, math.ceil(fractions.Fraction(steps) * (1 - fractions.Fraction(1, 10**12))))


def open_unit(name: str, value: Any) -> float:
    """Returns `value`, such as a delta, as a float strictly between 0 and 1."""
    result = real(name, value)
    if not 0 < result < 1:
        usual = "0.95" if name == "confidence" else "1 / (10 * num_examples)"
        raise ValueError(
            f"{name} must lie strictly between 0 and 1; got {result}. A usual choice is {usual}."
        )
    return result


def warn_of_large_delta(delta: float, num_examples: int, unit: str) -> None:
    """Warns, at the line of the caller's program, of a delta above 1 / num_examples."""
    if delta <= 1 / num_examples:
        return
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARY):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"delta should be well below 1 / num_examples, which is 1 / {num_examples}; got {delta:g}. "
        f"With such a delta, a program that publishes one {unit} at random counts as private. Pass "
        f"for example {0.1 / num_examples:.2g}.",
        UserWarning,
        stacklevel=level,
    )


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf is an array of typed PRNG keys."""
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def typed_key(name: str, key: Any) -> jax.Array:
    """Returns `key`; raises unless it is one typed PRNG key, not an integer or a uint32 array."""
    if not isinstance(key, jax.Array):
        raise TypeError(
            f"{name} must be a typed PRNG key such as jax.random.key(seed); got a value of type "
            f"{type(key).__name__}. Pass dpoptax.random.secure_key(), or jax.random.key(seed) in a "
            "test."
        )
    if not is_key(key):
        raise TypeError(
            f"{name} must be a typed PRNG key; got an array of {key.dtype} with shape {key.shape}. "
            "Make it with jax.random.key(seed), or wrap old key data with "
            "jax.random.wrap_key_data(data)."
        )
    if key.shape != ():
        raise ValueError(
            f"{name} must be one key; got an array of keys of shape {key.shape}. Pass one of them."
        )
    return key


def leading_axis_size(name: str, tree: Any) -> int:
    """Returns the size of the leading axis that all leaves of `tree` share."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ValueError(
            f"{name} must have at least one array with a leading batch axis; got {name} without "
            "arrays. Pass the data."
        )
    sizes: dict[str, int] = {}
    for path, leaf in leaves:
        label = name + jax.tree_util.keystr(path)
        # Not `jnp.shape`, which converts what it does not know: a file would be read whole.
        shape = leaf.shape if hasattr(leaf, "shape") else np.shape(leaf)
        if not shape:
            raise ValueError(
                f"every leaf of {name} must have a leading batch axis; got {label}, which is a "
                "scalar. Repeat it for every example. If it is public, you may also leave it out "
                "and close over it."
            )
        sizes[label] = shape[0]
    if len(set(sizes.values())) > 1:
        listing = ", ".join(f"{label}: {size}" for label, size in sizes.items())
        raise ValueError(
            f"the leaves of {name} must share one leading batch axis; got {listing}. Row i of "
            "every leaf must belong to example i."
        )
    return next(iter(sizes.values()))
