"""One root key in, one key per purpose out, so that no two purposes ever share a draw."""

import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from dpoptax import _validate
from dpoptax.random._chacha20 import CHACHA20_TAG
from dpoptax.random._threefry_unrolled import THREEFRY


class Keys(NamedTuple):
    """One key per purpose.

    Attributes:
        sampling_key: who takes part; secret, for amplification rests on it.
        noise_key: the noise of the releases; secret.
        model_key: dropout, reparameterised draws and the like. No guarantee rests on its secrecy:
            from a ChaCha20 root it is a key of JAX's default generator, which is faster.
    """

    sampling_key: PRNGKeyArray
    noise_key: PRNGKeyArray
    model_key: PRNGKeyArray


def split_by_purpose(key: PRNGKeyArray) -> Keys:
    """Derives one key per purpose from a root key; the root must not be used again.

    By the names of the purposes, so that no number used in a `fold_in` or a `split` elsewhere
    meets them by chance: `jax.random.split(key, 3)[1]` and `jax.random.fold_in(key, 1)` are one
    key with JAX's default generator.

    Args:
        key: a typed PRNG key, used for nothing else.

    Returns:
        Three independent keys.

    Raises:
        TypeError: an old-style or missing key.

    Example:
        >>> import jax
        >>> keys = split_by_purpose(jax.random.key(0))
        >>> keys.noise_key.shape
        ()
    """
    root = _validate.typed_key("key", key)
    keys = Keys(*(derive_key(root, f"dpoptax {purpose}") for purpose in Keys._fields))
    if str(jax.random.key_impl(root)) != CHACHA20_TAG:
        return keys
    words = jax.random.bits(keys.model_key, (2,), jnp.uint32)
    return keys._replace(model_key=jax.random.wrap_key_data(words, impl=THREEFRY))


def derive_key(key: PRNGKeyArray, domain: str) -> PRNGKeyArray:
    """Returns the key of a domain: another for every key and every text.

    Args:
        key: of which nothing else is derived but by `fold_in`.
        domain: any text.

    Returns:
        A key of the same kind.

    Example:
        >>> import jax
        >>> here, there = (derive_key(jax.random.key(0), text) for text in ("here", "there"))
        >>> bool((jax.random.key_data(here) != jax.random.key_data(there)).any())
        True
    """
    digest = hashlib.sha256(domain.encode()).digest()
    for word in np.frombuffer(digest[:8], "<u4"):
        key = jax.random.fold_in(key, word)
    return key
