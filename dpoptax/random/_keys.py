"""ChaCha20 keys from the operating system, or from a seed for tests."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PRNGKeyArray

from dpoptax import _validate
from dpoptax.random._allowed_keys import allowed_key
from dpoptax.random._chacha20 import CHACHA20, CHACHA20_TAG


def secure_key() -> PRNGKeyArray:
    """Draws a 256-bit ChaCha20 key from the operating system.

    The privacy guarantee rests on the secrecy of this key. Do not print it. Keep it, and every
    state that holds it, where the training data are kept, and delete it after the run. If several
    processes train together (`jax.distributed`), the first process sends its key to the others.

    Returns:
        A typed key for every `jax.random` function, and for `split_by_purpose`.

    Example:
        >>> import jax
        >>> jax.random.normal(secure_key(), (3,)).shape
        (3,)

    Reference: RFC 8439.
    """
    words = np.frombuffer(os.urandom(32), np.uint32)
    if jax.process_count() > 1:
        words = multihost_utils.broadcast_one_to_all(words)
    return jax.random.wrap_key_data(jnp.asarray(words), impl=CHACHA20)


def insecure_key(seed: int) -> PRNGKeyArray:
    """Makes a ChaCha20 key from a seed, for tests and examples. Whoever guesses the seed knows it.

    Args:
        seed: a whole number from 0 to 2**32 - 1.

    Returns:
        A typed key for every `jax.random` function.

    Raises:
        TypeError: the seed is not a whole number.
        ValueError: the seed is out of range.

    Example:
        >>> import jax
        >>> int(jax.random.bits(insecure_key(0))) == int(jax.random.bits(insecure_key(0)))
        True
    """
    seed = _validate.count("seed", seed, at_least=0)
    if seed >= 2**32:
        raise ValueError(
            "seed must be below 2**32; got a larger number. For a secret key: secure_key()."
        )
    return jax.random.key(np.uint32(seed), impl=CHACHA20)


def root_key(key: Any) -> PRNGKeyArray:
    """Returns the root key of a run: `key`, or a new secure key for None."""
    if key is None:
        return secure_key()
    if isinstance(key, int | np.integer):
        raise TypeError(
            "key must be a typed PRNG key; got a number. For a test pass jax.random.key(number). "
            "For real data leave the key out: a secret key from the operating system is then used."
        )
    return allowed_key("key", key)


def describe_key(key: Any) -> str:
    """Returns where the key of `root_key(key)` comes from, for the privacy report."""
    if key is None:
        return "ChaCha20, 256 bits of entropy of the operating system"
    tag = str(jax.random.key_impl(_validate.typed_key("key", key)))
    name = "ChaCha20" if tag == CHACHA20_TAG else tag
    return f"{name}, with a key from the caller, who must keep it secret"
