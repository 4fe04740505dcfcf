"""The root key of a run, with the description that the report prints."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from dpoptax import _validate
from dpoptax.random import secure_key
from dpoptax.random._chacha20 import CHACHA20_TAG


class RootKey(NamedTuple):
    """A root key, and how far the report may trust it."""

    key: PRNGKeyArray
    description: str


def root_key(key: Any) -> RootKey:
    """Returns the caller's key, or a new secure one if there is none."""
    if key is None:
        return RootKey(secure_key(), "ChaCha20, 256 bits of entropy of the operating system")
    if isinstance(key, int | np.integer):
        raise TypeError(
            f"key must be a typed PRNG key; got the number {key}. For a test pass "
            f"jax.random.key({key}), in general jax.random.key(seed). For real data leave the key "
            "out: fit then draws a secret key from the operating system."
        )
    impl = str(jax.random.key_impl(_validate.typed_key("key", key)))
    name = "ChaCha20" if impl == CHACHA20_TAG else impl
    return RootKey(key, f"{name}, given by the caller, who must keep it secret")
