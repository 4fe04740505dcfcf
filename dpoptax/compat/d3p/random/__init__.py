"""Random numbers under the names of `d3p.random`, on typed keys.

`PRNGKey()` draws a ChaCha key from the operating system. The type of a key decides which
generator draws; so these functions also take the keys of `jax.random.key` and
`jax.random.PRNGKey`, which are Threefry keys.
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from dpoptax import _validate
from dpoptax.compat.d3p._suites import as_key
from dpoptax.random import insecure_key, secure_key

__all__ = [
    "PRNGKey",
    "split",
    "fold_in",
    "random_bits",
    "uniform",
    "normal",
    "randint",
    "convert_to_jax_rng_key",
]


def __dir__() -> list[str]:
    return __all__


PRNGState = jax.Array


def PRNGKey(seed: int | bytes | Array | None = None) -> PRNGKeyArray:  # noqa: N802 (d3p's name)
    r"""Returns a ChaCha key: from the operating system, or from a seed.

    Args:
        seed: None for a secret key of 256 bits, which a private result needs. A whole number below
            2**32 repeats a run; whoever guesses it knows the noise. At most 32 bytes are a key of
            your own, which must be random and secret.

    Returns:
        A typed key.

    Raises:
        TypeError: a seed of another type.
        ValueError: a seed that is too large, or empty.

    Example:
        >>> PRNGKey().dtype == PRNGKey(0).dtype
        True
        >>> bool(PRNGKey(bytes(32)) == PRNGKey(bytes(32)))
        True
    """
    if seed is None:
        return secure_key()
    if not isinstance(seed, bytes):
        return insecure_key(int(seed) if jnp.ndim(seed) == 0 else seed)  # type: ignore[arg-type]
    if not 0 < len(seed) <= 32:
        raise ValueError(
            f"seed must have 1 to 32 bytes; got {len(seed)}. For a secret key: PRNGKey()."
        )
    words = np.frombuffer(seed.ljust(32, b"\0"), np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words), impl=jax.random.key_impl(insecure_key(0)))


def split(key: Any, num: int = 2) -> Array:
    """Splits a key, as `jax.random.split`.

    Args:
        key: a key, which must not be used again.
        num: how many keys to return.

    Returns:
        An array of keys.

    Example:
        >>> split(PRNGKey(0), 3).shape
        (3,)
    """
    return jax.random.split(as_key(key), num)


def fold_in(key: Any, data: Any) -> PRNGKeyArray:
    """Derives the key of a number, as `jax.random.fold_in`.

    Args:
        key: a key.
        data: a whole number, for example that of a step.

    Returns:
        A key.

    Example:
        >>> bool(fold_in(PRNGKey(0), 1) == fold_in(PRNGKey(0), 2))
        False
    """
    return jax.random.fold_in(as_key(key), data)


def random_bits(key: Any, bit_width: int, shape: tuple[int, ...]) -> Array:
    """Draws random bits.

    Args:
        key: a key.
        bit_width: 8, 16, 32 or 64 bits per number.
        shape: the shape of the result.

    Returns:
        Unsigned whole numbers.

    Raises:
        ValueError: another width.

    Example:
        >>> random_bits(PRNGKey(0), 16, (3,)).dtype
        dtype('uint16')
    """
    if bit_width not in (8, 16, 32, 64):
        raise ValueError(
            f"bit_width must be 8, 16, 32 or 64; got {_validate.described(bit_width)}. Pass 32."
        )
    return jax.random.bits(as_key(key), tuple(shape), jnp.dtype(f"uint{bit_width}"))


def uniform(
    key: Any,
    shape: tuple[int, ...] = (),
    dtype: Any = float,
    minval: Any = 0.0,
    maxval: Any = 1.0,
) -> Array:
    """Draws from a uniform distribution, as `jax.random.uniform`.

    Args:
        key: a key.
        shape: the shape of the result.
        dtype: its type.
        minval: the lower end.
        maxval: the upper end, which is not drawn.

    Returns:
        An array.

    Example:
        >>> uniform(PRNGKey(0), (2, 3)).shape
        (2, 3)
    """
    return jax.random.uniform(as_key(key), tuple(shape), dtype, minval, maxval)


def normal(key: Any, shape: tuple[int, ...] = (), dtype: Any = float) -> Array:
    """Draws from the standard normal distribution, as `jax.random.normal`.

    Args:
        key: a key.
        shape: the shape of the result.
        dtype: its type.

    Returns:
        An array. The noise of `DPSVI` is drawn by `dpoptax.privatize`, not by this.

    Example:
        >>> normal(PRNGKey(0), (2, 3)).shape
        (2, 3)
    """
    return jax.random.normal(as_key(key), tuple(shape), dtype)


def randint(key: Any, shape: tuple[int, ...], minval: Any, maxval: Any, dtype: Any = int) -> Array:
    """Draws whole numbers, as `jax.random.randint`.

    Args:
        key: a key.
        shape: the shape of the result.
        minval: the smallest number.
        maxval: one above the largest number.
        dtype: its type.

    Returns:
        An array.

    Example:
        >>> set(randint(PRNGKey(0), (100,), 3, 5).tolist())
        {3, 4}
    """
    return jax.random.randint(as_key(key), tuple(shape), minval, maxval, dtype)


def convert_to_jax_rng_key(rng_key: Any) -> PRNGKeyArray:
    """Derives a Threefry key, for parts of a program that need no secrecy.

    Args:
        rng_key: a key, which must not be used again.

    Returns:
        A typed key of JAX's own generator. It has 64 bits.

    Example:
        >>> convert_to_jax_rng_key(PRNGKey(0)).dtype
        key<fry>
    """
    return jax.random.wrap_key_data(random_bits(rng_key, 32, (2,)), impl="threefry2x32")


def __getattr__(name: str) -> Any:
    # It imports this module.
    if name == "debug":
        return importlib.import_module(f"{__name__}.debug")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
