"""Entropy of the operating system, or a seed for tests, in; a ChaCha20 key out."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PRNGKeyArray

from dpoptax import _validate
from dpoptax.random._chacha20 import CHACHA20


def secure_key() -> PRNGKeyArray:
    """Draws a ChaCha20 key of 256 bits from the operating system.

    A guarantee rests on the secrecy of its key: do not print it, keep it with data as sensitive
    as the training data, and forget it after the run. Where several processes train together
    (`jax.distributed`), the first one's is sent to the others.

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
    """Makes a ChaCha20 key of a seed, for tests and examples: whoever guesses it knows the noise.

    Args:
        seed: a whole number from 0 to 2**32 - 1.

    Returns:
        A typed key for every `jax.random` function.

    Raises:
        TypeError: a seed that is not whole.
        ValueError: a seed out of range.

    Example:
        >>> import jax
        >>> int(jax.random.bits(insecure_key(0))) == int(jax.random.bits(insecure_key(0)))
        True
    """
    seed = _validate.count("seed", seed, at_least=0)
    if seed >= 2**32:
        raise ValueError(f"a seed for tests is below 2**32; got {seed}. For secrets: secure_key().")
    return jax.random.key(np.uint32(seed), impl=CHACHA20)


def root_of(key: Any) -> tuple[PRNGKeyArray, str]:
    """Returns the root key of a run, and in words how far it may be trusted.

    Args:
        key: None for a new secure key, a whole number for a test key, or a key.

    Returns:
        A typed key and a line for the report.

    Raises:
        TypeError: anything else, an old-style key among it.
    """
    if key is None:
        return secure_key(), "ChaCha20, 256 bits of entropy of the operating system"
    if isinstance(key, int | np.integer):
        return insecure_key(int(key)), "ChaCha20, from a small seed: not secret, for tests only"
    generator = jax.random.key_impl(_validate.typed_key("key", key))
    name = "ChaCha20" if generator == jax.random.key_impl(insecure_key(0)) else str(generator)
    return key, f"{name}, a key given by the caller, as secret as they kept it"


insecure_key.__test__ = False  # type: ignore[attr-defined]  # not a test, whatever collects it
