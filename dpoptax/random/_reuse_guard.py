"""Keys and when they are used in; a refusal where two transformations of one chain share one out.

Two transformations share noise if they draw from one key. Those of one chain are told by the order
of events: both are initialised before either updates. One run after another with the same key is
not refused: it may be the same run again.
"""

import itertools
import weakref

import jax
from jaxtyping import PRNGKeyArray

_clock = itertools.count()
# A key is forgotten with the last transformation that holds it.
_holders: "weakref.WeakValueDictionary[bytes, weakref.WeakSet[Claim]]" = (
    weakref.WeakValueDictionary()
)


class Claim:
    """What one transformation does with its key; known to all others while it lives."""

    def __init__(self, key: PRNGKeyArray) -> None:
        self._begun: int | None = None
        self._used: int | None = None
        self._others: weakref.WeakSet[Claim] = weakref.WeakSet()
        if not isinstance(key, jax.core.Tracer):  # of a traced key nothing is known
            name = str(jax.random.key_impl(key)).encode() + jax.random.key_data(key).tobytes()
            self._others = _holders.setdefault(name, weakref.WeakSet())
            self._others.add(self)

    def begin(self) -> None:
        """Marks the start of a run."""
        self._begun, self._used = next(_clock), None

    def use(self) -> None:
        """Marks a draw.

        Raises:
            ValueError: another transformation that was initialised beside this one has drawn.
        """
        if self._used is not None or self._begun is None:
            return
        for other in self._others:
            if other is not self and other._used is not None and other._used > self._begun:
                raise ValueError(
                    "two transformations that run side by side were given one key, and would draw "
                    "the same noise. Split the key, and give each a part of its own."
                )
        self._used = next(_clock)
