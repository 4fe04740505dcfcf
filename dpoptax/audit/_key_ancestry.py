"""Whether one known key may be derived from another one by numbers that are not known.

`fold_in` and `split` of JAX's default PRNG encrypt a number of 32 bits under the key, by the cipher
Threefry. So the number that leads from one key to another follows by decryption, if there is one.

Reference: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import functools
import hashlib
from typing import Any, TypeAlias

import numpy as np

from dpoptax.random._derive import Keys
from dpoptax.random._threefry_unrolled import PARITY, ROTATIONS

# Two words of 32 bits, or many.
_Pair: TypeAlias = tuple[Any, Any]
# A key between two others is looked for among the first so many children, and their children.
_CHILDREN, _FEW = 4096, 64
_ROUNDS = [ROTATIONS[group % 2] for group in range(5)]
_BITS = np.uint32(32)


@functools.lru_cache(maxsize=10_000)
def may_derive(parent: bytes, child: bytes) -> bool:
    """Whether numbers lead from a key to another one, in some steps.

    The last step is by any number. Those before are by small numbers, or by a purpose of the
    package.

    Args:
        parent: the words of a key.
        child: those of another one.
    """
    if len(parent) != 8 or len(child) != 8:
        return False
    key, later = _words(parent), _words(child)
    children = _children(key, np.arange(_CHILDREN, dtype=np.uint32))
    few = np.arange(_FEW, dtype=np.uint32)
    between = [key, children]
    between.append(_children(tuple(words[:_FEW, None] for words in children), few))
    for purpose in Keys._fields:
        digest = hashlib.sha256(f"dpoptax {purpose}".encode()).digest()
        for start in (key, children):
            for word in np.frombuffer(digest[:8], "<u4"):
                start = _children(start, word)
                between.append(start)
    return any(np.any(_decrypted(keys, later)[0] == 0) for keys in between)


def _children(keys: _Pair, numbers: Any) -> _Pair:
    """Returns the keys that `fold_in` derives."""
    return _encrypted(keys, (np.zeros_like(numbers), numbers))


def _words(words: bytes) -> _Pair:
    first, second = np.frombuffer(words, np.uint32).copy()
    return first, second


def _schedule(key: _Pair) -> list[Any]:
    return [*key, key[0] ^ key[1] ^ np.uint32(PARITY)]


def _encrypted(key: _Pair, block: _Pair) -> _Pair:
    words = _schedule(key)
    with np.errstate(over="ignore"):
        first, second = block[0] + words[0], block[1] + words[1]
        for group, rotations in enumerate(_ROUNDS):
            for bits in map(np.uint32, rotations):
                first = first + second
                second = first ^ ((second << bits) | (second >> (_BITS - bits)))
            first = first + words[(group + 1) % 3]
            second = second + words[(group + 2) % 3] + np.uint32(group + 1)
    return first, second


def _decrypted(key: _Pair, block: _Pair) -> _Pair:
    words, (first, second) = _schedule(key), block
    with np.errstate(over="ignore"):
        for group, rotations in reversed([*enumerate(_ROUNDS)]):
            first = first - words[(group + 1) % 3]
            second = second - words[(group + 2) % 3] - np.uint32(group + 1)
            for bits in map(np.uint32, reversed(rotations)):
                second = first ^ second
                second = (second >> bits) | (second << (_BITS - bits))
                first = first - second
        return first - words[0], second - words[1]
