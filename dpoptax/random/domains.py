"""One root key in, one key per purpose out, so that no two purposes ever share a draw."""

from typing import NamedTuple

import jax
from jaxtyping import PRNGKeyArray

from dpoptax import _checks


class Keys(NamedTuple):
    """One key per purpose.

    Attributes:
        sampling_key: who takes part; secret, for amplification rests on it.
        noise_key: the noise of the releases; secret.
        model_key: dropout, reparameterised draws and the like.
    """

    sampling_key: PRNGKeyArray
    noise_key: PRNGKeyArray
    model_key: PRNGKeyArray


def split_by_purpose(key: PRNGKeyArray) -> Keys:
    """Splits a root key into one key per purpose; the root must not be used again.

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
    return Keys(*jax.random.split(_checks.typed_key("key", key), len(Keys._fields)))
