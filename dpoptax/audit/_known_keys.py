"""Keys whose words can be computed: one that is derived outside of a step may be equal to another.

A step may get a key as an argument, and derive the same key from its parent, or from its seed. Both
are known when the step is certified, so they are compared.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpoptax.audit._key_ancestry import may_derive

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


def root_of_raw_words(words: Any, implementation: str) -> Any:
    """Returns the root of a key that is wrapped around words: `words` is as in `Label.words`."""
    _IMPLEMENTATIONS.setdefault(implementation, implementation)
    kind, content = words
    return ("root", (kind, implementation, content))


def are_apart(first: Any, second: Any) -> bool:
    """Whether two paths with different roots surely name different keys, unless a root is common.

    A key that is computed may be any key. So may one that is derived by unknown numbers from a key
    that the program wrote. Keys of the arguments and captured ones are independent, or the steps
    between them are found.
    """
    kinds = {path[0][1][0] for path in (first, second)}
    if "state" in kinds:
        return True  # no key
    if "computed" in kinds:
        return False
    return _is_apart(first, second) and _is_apart(second, first)


def _is_apart(path: Any, other: Any) -> bool:
    """Whether no key on the way to the end of a path is the root of another one."""
    known, targets = _elements(path[:1]), _elements(other[:1])
    kind = path[0][1][0]
    made = kind in ("constant", "written")
    if known is None or targets is None:
        return not made and kind != "captured"
    many = len(targets) > 1
    for length in range(1, len(path) + 1):
        last = path[length - 1][0]
        if last in ("bound", "released"):
            return True  # a secret hash
        words = _words(path[:length])
        if words is not None:
            if many and words in targets:
                return False
            known = [words]
        elif length > 1 or len(known) == 1:
            return not made and not any(
                one in targets or any(may_derive(one, target) for target in targets)
                for one in known
            )
    return True


def _elements(root: Any) -> list[bytes] | None:
    """Returns the words of a root, or of each key of one that has many; None if not known."""
    key = _key(root)
    if key is None:
        return None
    words = np.asarray(jax.random.key_data(key))
    return [one.tobytes() for one in words.reshape(-1, words.shape[-1])]


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
        if kind in ("key", "captured", "words", "written") and isinstance(known[1], bytes):
            implementation = _IMPLEMENTATIONS[known[0]]
            size = jax.random.key_data(jax.random.key(0, impl=implementation)).size
            words = np.frombuffer(known[1], np.uint32)
            shape = (-1, size) if words.size > size else (size,)
            return jax.random.wrap_key_data(jnp.asarray(words.reshape(shape)), impl=implementation)
    except (KeyError, ValueError, TypeError, OverflowError):
        # Nothing is known about a key of an implementation that has no name.
        return None
    return None
