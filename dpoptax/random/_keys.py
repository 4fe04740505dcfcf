"""ChaCha keys from the operating system, or from a seed for tests."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PRNGKeyArray

from dpoptax import _validate
from dpoptax.random._allowed_keys import allowed_key
from dpoptax.random._chacha import KEY_TYPES, rounds_of

# The fewest rounds without a known attack: docs/randomness.md has the reasons.
DEFAULT_ROUNDS = 8


def secure_key(*, rounds: int = DEFAULT_ROUNDS) -> PRNGKeyArray:
    """Draws a 256-bit ChaCha key from the operating system.

    The privacy guarantee rests on the secrecy of this key. Do not print it. Keep it, and every
    state that holds it, where the training data are kept, and delete it after the run. If several
    processes train together (`jax.distributed`), the first process sends its key to the others.

    Args:
        rounds: of the cipher, for random bits and noise: 8, 12 or 20. The best published attacks
            break 7 rounds, with 2**167 operations at least. Twelve and twenty have a larger margin
            and take more time; `docs/randomness.md` has the numbers. Keys are derived with twenty
            rounds, whatever you choose.

    Returns:
        A typed key for every `jax.random` function, and for `split_by_purpose`.

    Raises:
        TypeError: the number of rounds is not a whole number.
        ValueError: the number of rounds is not 8, 12 or 20.

    Example:
        >>> import jax
        >>> jax.random.normal(secure_key(), (3,)).shape
        (3,)
        >>> str(jax.random.key_impl(secure_key(rounds=20)))
        'chacha20'

    Reference: RFC 8439; Aumasson 2019, "Too much crypto", for eight rounds.
    """
    key_type = _key_type(rounds)
    words = np.frombuffer(os.urandom(32), np.uint32)
    if jax.process_count() > 1:
        words = multihost_utils.broadcast_one_to_all(words)
    return jax.random.wrap_key_data(jnp.asarray(words), impl=key_type)


def insecure_key(seed: int, *, rounds: int = DEFAULT_ROUNDS) -> PRNGKeyArray:
    """Makes a ChaCha key from a seed, for tests and examples. Whoever guesses the seed knows it.

    Args:
        seed: a whole number from 0 to 2**32 - 1.
        rounds: as in `secure_key`.

    Returns:
        A typed key for every `jax.random` function.

    Raises:
        TypeError: the seed or the number of rounds is not a whole number.
        ValueError: one of them is out of range.

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
    return jax.random.key(np.uint32(seed), impl=_key_type(rounds))


def _key_type(rounds: int) -> Any:
    rounds = _validate.count("rounds", rounds)
    if rounds not in KEY_TYPES:
        raise ValueError(
            f"rounds must be 8, 12 or 20; got {rounds}. Eight are the default and the fastest; "
            "pass 20 for the cipher of RFC 8439."
        )
    return KEY_TYPES[rounds]


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
        return f"ChaCha{DEFAULT_ROUNDS}, 256 bits of entropy of the operating system"
    rounds = rounds_of(_validate.typed_key("key", key))
    name = str(jax.random.key_impl(key)) if rounds is None else f"ChaCha{rounds}"
    return f"{name}, with a key from the caller, who must keep it secret"
