"""Random numbers under the names of `d3p.random.debug`: JAX's own generator, for debugging only."""

import secrets
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from dpoptax.compat.d3p._suites import as_key
from dpoptax.compat.d3p.random import fold_in, normal, randint, random_bits, split, uniform

__all__ = [
    "PRNGKey",
    "convert_to_jax_rng_key",
    "fold_in",
    "normal",
    "randint",
    "random_bits",
    "split",
    "uniform",
]


def __dir__() -> list[str]:
    return __all__


PRNGState = jax.Array


def PRNGKey(seed: int | None = None) -> PRNGKeyArray:  # noqa: N802 (d3p's name)
    """Returns a Threefry key, which is not cryptographically secure.

    Args:
        seed: a whole number; None for one from the operating system.

    Returns:
        A typed key. Privacy reports of `DPSVI.run` name its type.

    Example:
        >>> PRNGKey(0).dtype
        key<fry>
    """
    seed = secrets.randbits(32) if seed is None else seed
    return jax.random.key(seed, impl="threefry2x32")


def convert_to_jax_rng_key(rng_key: Any) -> PRNGKeyArray:
    """Returns the key itself, as a typed key.

    Args:
        rng_key: a key.

    Returns:
        A typed key.

    Example:
        >>> bool(convert_to_jax_rng_key(PRNGKey(0)) == PRNGKey(0))
        True
    """
    return as_key(rng_key)
