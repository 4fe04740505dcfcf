"""A guard against releases that share their noise.

It raises if one transformation starts a second run, if it releases different gradients from one
state, or if two transformations of one chain were given the same key. It only observes, and never
changes a number: `init` stays a pure function.
"""

import weakref
import zlib
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from dpoptax._pytree import PyTree

REMEDY = (
    "Make another transformation for the second run, with a different key: "
    "privatize(..., key=jax.random.fold_in(key, 1))."
)
# Transformations in use, by their key. A key is forgotten with the last transformation that has it.
_guards_by_key: "weakref.WeakValueDictionary[bytes, weakref.WeakSet[KeyReuseGuard]]" = (
    weakref.WeakValueDictionary()
)


class KeyReuseGuard:
    """Watches the calls of `init` and `update` of one transformation.

    A call of `init` counts if it makes an array. Under `jax.jit` and `jax.eval_shape` it makes a
    tracer, which does not count: nobody can see how often the compiled program runs. Whether the
    array is still alive does not matter. A state that was stacked with others, or moved to another
    device, is in use although the first array is gone.
    """

    def __init__(self, key: PRNGKeyArray) -> None:
        self._num_inits = 0
        self._used = False
        self._drew = False
        # A checksum of each release that was made outside of compiled functions, by its noise key.
        self._releases: dict[bytes, int] = {}
        self._others: weakref.WeakSet[KeyReuseGuard] = weakref.WeakSet()
        # The value of a traced key is unknown, so it cannot be compared with other keys.
        if not _is_traced(key):
            self._others = _guards_by_key.setdefault(_name(key), weakref.WeakSet())
            self._others.add(self)
        self._earlier = self._used_others()

    def on_init(self, state_key: PRNGKeyArray, params: PyTree) -> None:
        """Counts a call of `init`; raises if it starts a second run.

        Raises:
            ValueError: an `update` was made, or was compiled after another call of `init`; or
                `init` is mapped by `jax.vmap`.
        """
        if is_placeholder(params):
            return
        if _is_traced(state_key):
            self._earlier = self._used_others()
            return
        if _is_traced(params):
            raise ValueError(
                "expected a call of init for each run; got jax.vmap of init, and all members would "
                "get the same key and draw the same noise. Make a transformation for each member, "
                "with a key of its own, call init of each, and stack the states."
            )
        # A traced update alone is not a draw: a program may be compiled before its first run.
        if self._drew or (self._used and self._num_inits):
            raise ValueError(
                "expected one run of each transformation; got another call of init after an "
                "update, and a second run would draw the same noise as the first. "
                f"{REMEDY} For the shapes of a state: jax.eval_shape(tx.init, params)."
            )
        self._num_inits += 1
        self._earlier = self._used_others()

    def on_update(self, state: Any, next_state: Any, grads: PyTree) -> None:
        """Marks a draw of noise; raises if another run may draw the same noise.

        A state has a step and a key. The steps show whether the draw is made now or only compiled.

        Raises:
            ValueError: `init` was called more than once, a transformation with the same key was
                in use at the same time, or the state is a constant in a compiled function.
        """
        if not _is_traced(state) and _is_traced((next_state.step, grads)):
            raise ValueError(
                "expected the state as an argument of the function that JAX compiles or maps; got "
                "a state that is a constant in it, and each call would draw the same noise. Pass "
                "the state in, and return the new one."
            )
        if self._num_inits > 1:
            raise ValueError(
                f"expected one call of init for each transformation; got {self._num_inits} before "
                f"this update, and runs from these states would draw the same noise. {REMEDY}"
            )
        self._drew = self._drew or not _is_traced(state.step)
        if self._used:
            return
        for other in self._others:
            if other is not self and other._used and other not in self._earlier:
                raise ValueError(
                    "expected a different key for each transformation of a chain; got two "
                    "transformations that were given one key, and would draw the same noise. "
                    "Split the key, and give each a part: jax.random.split(key)."
                )
        self._used = True

    def on_release(self, key: PRNGKeyArray, release: PyTree) -> None:
        """Remembers what was released with a key.

        To repeat a step with the same gradients is no second release.

        Raises:
            ValueError: something else was released with the same key.
        """
        leaves = jax.tree.leaves(release)
        # What is spread over several processes can be read by none of them.
        if _is_traced((key, leaves)) or not all(leaf.is_fully_addressable for leaf in leaves):
            return
        checksum = 0
        for leaf in leaves:
            checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
        if self._releases.setdefault(_name(key), checksum) != checksum:
            raise ValueError(
                "expected the state that the last update returned; got a state that was used "
                "already, with other gradients, and the difference of both releases would have no "
                "noise. Keep the new state: updates, state = tx.update(grads, state, params). To "
                "repeat a run from its start, make the transformation again."
            )

    def _used_others(self) -> "weakref.WeakSet[KeyReuseGuard]":
        # The same key in one run after another is allowed: it may be the same run again. What was
        # used before this transformation started belongs to an earlier run. What is used between
        # its start and its first update runs at the same time.
        return weakref.WeakSet(other for other in self._others if other._used)


def is_placeholder(params: Any) -> bool:
    """Whether nobody trains a state of these parameters.

    `optax.tree_map_params` calls `init` with an object without leaves, to see where a state holds
    parameters.
    """
    empty = not jax.tree.leaves(params)
    return empty and not isinstance(params, type(None) | dict | list | tuple)


def _is_traced(tree: PyTree) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _name(key: PRNGKeyArray) -> bytes:
    return str(jax.random.key_impl(key)).encode() + np.asarray(jax.random.key_data(key)).tobytes()
