"""Examples for input canaries: wrong labels, and inputs that no data set has."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dpoptax import _validate


def mislabelled(
    labels: Int[Array, " count"], num_classes: int, key: PRNGKeyArray
) -> Int[Array, " count"]:
    """Returns labels of which each is another class, uniform among the wrong ones.

    Take examples that are not in the training set, such as public or held-out ones.

    Args:
        labels: int `(count,)`, from 0 to num_classes - 1.
        num_classes: at least 2.
        key: a typed PRNG key.

    Returns:
        int `(count,)`.

    Raises:
        TypeError: `num_classes` is not a whole number, or the key is not a typed one.
        ValueError: there are fewer than 2 classes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> labels = jnp.array([0, 1, 2, 2])
        >>> bool(jnp.any(mislabelled(labels, 3, jax.random.key(0)) == labels))
        False
    """
    num_classes = _validate.count("num_classes", num_classes, at_least=2)
    labels = jnp.asarray(labels)
    shift = jax.random.randint(_validate.typed_key("key", key), labels.shape, 1, num_classes)
    # Not in the type of the labels: the sum of two int8 may not be an int8.
    return ((labels.astype(jnp.int32) + shift) % num_classes).astype(labels.dtype)


def uniform_inputs(
    count: int, shape: tuple[int, ...], key: PRNGKeyArray, *, low: float = 0.0, high: float = 1.0
) -> Float[Array, "count ..."]:
    """Returns inputs of independent uniform numbers, which are unlike any data.

    Shape and range are arguments, because they must be public: do not compute them from the data.

    Args:
        count: how many inputs.
        shape: of one input.
        key: a typed PRNG key.
        low: the lower end of the range.
        high: the upper end.

    Returns:
        float32 `(count, *shape)`.

    Raises:
        TypeError: `count` is not a whole number, `shape` is no tuple, or the key is not typed.
        ValueError: the range is empty.

    Example:
        >>> import jax
        >>> uniform_inputs(10, (8, 8), jax.random.key(0), high=16.0).shape
        (10, 8, 8)
    """
    count = _validate.count("count", count)
    if not isinstance(shape, tuple | list):
        raise TypeError(
            f"shape must be a tuple of whole numbers; got {_validate.described(shape)}. Pass for "
            "example (8, 8)."
        )
    low, high = _validate.real("low", low), _validate.real("high", high)
    if not low < high:
        raise ValueError(f"low must be below high; got {low} and {high}. Swap them.")
    key = _validate.typed_key("key", key)
    return jax.random.uniform(key, (count, *shape), jnp.float32, low, high)
