"""A guard against runs that draw the same noise.

It raises if one transformation starts a second run, or if two transformations of one chain were
given the same key. It only observes, and never changes a number: `init` stays a pure function.
"""

import weakref
from typing import Any

import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

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
        self._others: weakref.WeakSet[KeyReuseGuard] = weakref.WeakSet()
        # The value of a traced key is unknown, so it cannot be compared with other keys.
        if not isinstance(key, jax.core.Tracer):
            name = str(jax.random.key_impl(key)).encode() + jax.random.key_data(key).tobytes()
            self._others = _guards_by_key.setdefault(name, weakref.WeakSet())
            self._others.add(self)
        self._earlier = self._used_others()

    def on_init(self, state_key: PRNGKeyArray, params: PyTree) -> None:
        """Counts a call of `init`; raises if it starts a second run.

        Raises:
            ValueError: an `update` was made, or was compiled after another call of `init`.
        """
        if _is_placeholder(params):
            return
        if isinstance(state_key, jax.core.Tracer):
            self._earlier = self._used_others()
            return
        # A traced update alone is not a draw: a program may be compiled before its first run.
        if self._drew or (self._used and self._num_inits):
            raise ValueError(
                "expected one run of each transformation; got another call of init after an "
                "update, and a second run would draw the same noise as the first. "
                f"{REMEDY} For the shapes of a state: jax.eval_shape(tx.init, params)."
            )
        self._num_inits += 1
        self._earlier = self._used_others()

    def on_update(self, state_step: Array) -> None:
        """Marks a draw of noise; raises if another run may draw the same noise.

        The step of the state shows whether the draw is made now or only compiled.

        Raises:
            ValueError: `init` was called more than once, or a transformation with the same key was
                in use at the same time.
        """
        if self._num_inits > 1:
            raise ValueError(
                f"expected one call of init for each transformation; got {self._num_inits} before "
                f"this update, and runs from these states would draw the same noise. {REMEDY}"
            )
        self._drew = self._drew or not isinstance(state_step, jax.core.Tracer)
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

    def _used_others(self) -> "weakref.WeakSet[KeyReuseGuard]":
        # The same key in one run after another is allowed: it may be the same run again. What was
        # used before this transformation started belongs to an earlier run. What is used between
        # its start and its first update runs at the same time.
        return weakref.WeakSet(other for other in self._others if other._used)


def _is_placeholder(params: Any) -> bool:
    # `optax.tree_map_params` calls `init` with an object without leaves, to see where a state holds
    # parameters. Nobody trains that state.
    empty = not jax.tree.leaves(params)
    return empty and not isinstance(params, type(None) | dict | list | tuple)
