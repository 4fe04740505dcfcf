"""Keys whose words can be computed: one that is derived outside of a step may be equal to another.

A step may get a key as an argument, and derive the same key from its parent, or from its seed. Both
are known when the step is certified, so they are compared.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

# The implementation of keys by its name.
_IMPLEMENTATIONS: dict[str, Any] = {}


def root_of_words(key: Any) -> Any:
    """Returns the root of a key with known words: equal keys have one root."""
    implementation = jax.random.key_impl(key)
    _IMPLEMENTATIONS.setdefault(str(implementation), implementation)
    words = np.asarray(jax.random.key_data(key)).tobytes()
    return ("root", ("key", str(implementation), words))


def root_of_seed(implementation: str, seed: int) -> Any:
    """Returns the root of a key that the program makes of a written number."""
    return ("root", ("constant", implementation, seed))


def same_root(first: Any, second: Any) -> Iterator[tuple[Any, Any]]:
    """Yields two paths as paths from one root, if one starts with the root of the other."""
    for one, other in ((first, second), (second, first)):
        root = _words(other[:1])
        if root is None:
            continue
        for length in range(1, len(one) + 1):
            words = _words(one[:length])
            if words is None:
                break
            if words == root:
                yield (*other[:1], *one[length:]), other
                return


@functools.lru_cache(maxsize=10_000)
def _words(path: Any) -> bytes | None:
    """Returns the words of a key, if it is derived from known ones by known numbers."""
    key = _key(path)
    if key is None or key.shape:
        return None
    return np.asarray(jax.random.key_data(key)).tobytes()


@functools.lru_cache(maxsize=10_000)
def _key(path: Any) -> Any:
    *before, (kind, *part) = path
    if kind == "root":
        return _root(*part)
    key = _key(tuple(before))
    if key is None or kind not in ("fold", "split") or getattr(part[-1], "terms", True):
        return None
    number = part[-1].offset
    if kind == "fold":
        return None if key.shape else jax.random.fold_in(key, np.uint32(number % 2**32))
    keys = key if key.shape else jax.random.split(key, part[0])
    return keys[number] if keys.shape == part[0] and 0 <= number < len(keys) else None


def _root(content: Any) -> Any:
    kind, *known = content
    try:
        if kind == "constant":
            return jax.random.key(known[1], impl=known[0])
        if kind == "key":
            implementation = _IMPLEMENTATIONS[known[0]]
            size = jax.random.key_data(jax.random.key(0, impl=implementation)).size
            words = np.frombuffer(known[1], np.uint32)
            shape = (-1, size) if words.size > size else (size,)
            return jax.random.wrap_key_data(words.reshape(shape), impl=implementation)
    except (KeyError, ValueError, TypeError, OverflowError):
        # Nothing is known about a key of an implementation that has no name.
        return None
    return None
