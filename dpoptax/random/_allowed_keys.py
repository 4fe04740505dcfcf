"""The key types that batches and noise may come from.

A guarantee needs more of a key than a simulation does: `fold_in`, `split` and random bits must
depend on the key and on their arguments only. They must be the same under `vmap`, `scan` and `jit`.
JAX promises this for Threefry. ChaCha is our own type. The RBG types of JAX break it:

- `unsafe_rbg`: `fold_in` under `vmap` depends on the position in the batch. The Feistel network of
  the samplers is then no permutation, and a batch holds an example several times.
- `rbg`: random bits under `vmap` follow from the first key of the batch alone. Runs with different
  keys then share noise, and the order of an epoch can change from one step to the next.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from dpoptax import _validate
from dpoptax.random._chacha import KEY_TYPES
from dpoptax.random._threefry_unrolled import THREEFRY, UNROLLED


def allowed_key(name: str, key: Any) -> PRNGKeyArray:
    """Returns `key`; raises unless it is one typed key of an allowed type, also while tracing."""
    key = _validate.typed_key(name, key)
    if key.dtype not in _allowed_dtypes():
        raise TypeError(
            f"{name} must be a threefry2x32 or ChaCha key; got a key of the type "
            f"{jax.random.key_impl(key)!r}. The privacy of batches and noise is only shown for "
            "these two: random numbers of other types can change under jax.vmap. Pass "
            "dpoptax.random.secure_key(), or jax.random.key(seed, impl='threefry2x32') in a test. "
            "The setting jax_default_prng_impl may stay as it is."
        )
    return key


@functools.cache
def _allowed_dtypes() -> frozenset[Any]:
    # The type itself, not its name: a user's own type may have any name. Only traced, so that no
    # device is needed.
    def dtype_of(impl: Any, words: int) -> Any:
        return jax.eval_shape(
            lambda data: jax.random.wrap_key_data(data, impl=impl),
            jax.ShapeDtypeStruct((words,), jnp.uint32),
        ).dtype

    chacha = [dtype_of(impl, 8) for impl in KEY_TYPES.values()]
    return frozenset([dtype_of(THREEFRY, 2), dtype_of(UNROLLED, 2), *chacha])
