"""The state of a mechanism: made, checked and used, so that no noise is repeated or left out.

Beside the state of the mechanism it has two words of what the transformation releases. A state that
is restored into another transformation does not fit: the noise of its steps would have another
matrix or scale than was accounted. Such a step, and a step after the last that the mechanism
covers, raises an error if the state is known. Inside a compiled function it releases NaN. That is a
constant, so it tells nothing about any example.
"""

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray, UInt32

from dpoptax._pytree import PyTree
from dpoptax.clipping import ClipRule
from dpoptax.mechanisms import StatefulMechanism
from dpoptax.mechanisms._state import AnyMechanism, NoiseKeys
from dpoptax.per_example import PerExampleGrads
from dpoptax.schedules import ScalarOrSchedule


class MechanismState(NamedTuple):
    """What was released with this state, as two words, and the state itself, which is secret."""

    released: UInt32[Array, "2"]
    inner: PyTree

    def __repr__(self) -> str:
        """Leaves out the state, which must not appear in logs and error messages."""
        return "MechanismState(<not shown>)"


def init(mechanism: AnyMechanism, identity: str, params: PyTree, key: PRNGKeyArray) -> PyTree:
    """Returns the state before the first step; empty for a mechanism without state."""
    if not isinstance(mechanism, StatefulMechanism):
        return ()
    return MechanismState(jnp.asarray(_words(identity)), mechanism.init(params, key))


def release(
    mechanism: StatefulMechanism,
    identity: str,
    keys: NoiseKeys,
    grads: PerExampleGrads,
    clip: ClipRule,
    noise_multiplier: ScalarOrSchedule,
    step: Int[Array, ""] | int,
    state: Any,
) -> tuple[PyTree, PyTree]:
    """Returns the noisy sum, and the next state.

    Raises:
        ValueError: the state is of another mechanism or other parameters; or it is known, and is of
            another transformation or after the last step.
    """
    _check_structure(mechanism, keys.root, grads, state)
    fits = _fits(mechanism, identity, step, state)
    noisy, inner = mechanism.release_with_state(
        keys, grads, clip, noise_multiplier, step, state.inner
    )
    # Selected, so that nothing of the sum is left.
    noisy = jax.tree.map(lambda leaf: jnp.where(fits, leaf, jnp.nan), noisy)
    return noisy, MechanismState(state.released, inner)


def refuse(mechanism: AnyMechanism, state: PyTree) -> None:
    """Raises if a mechanism without state is given the state of another one."""
    if jax.tree.leaves(state):
        raise ValueError(
            f"expected a state of the mechanism {type(mechanism).__name__}, which has none; got "
            "the state of a mechanism with correlated noise. Continue with the mechanism of that "
            "run, or start a new run and count both."
        )


def _fits(
    mechanism: StatefulMechanism, identity: str, step: Int[Array, ""] | int, state: MechanismState
) -> Bool[Array, ""]:
    """Whether a step from this state is one that was accounted; raises if the answer is known."""
    words, last = _words(identity), mechanism.num_steps
    if not isinstance(state.released, jax.core.Tracer) and np.any(state.released != words):
        raise ValueError(
            "expected the state of a run with the clip, noise, batch size and mechanism of this "
            "transformation, because the noise of its steps is correlated; got a state of another "
            "one. Continue with the transformation of that run, or start a new run with init and "
            "count both."
        )
    if last is not None and not isinstance(step, jax.core.Tracer) and int(step) >= last:
        raise ValueError(
            f"expected at most {last} steps, because {type(mechanism).__name__} has correlated "
            f"noise for so many; got step number {int(step) + 1}. Plan the run with a strategy of "
            "more steps."
        )
    fits = jnp.all(state.released == words)
    return fits if last is None else fits & (jnp.asarray(step) < last)


def _check_structure(
    mechanism: StatefulMechanism, key: PRNGKeyArray, grads: PerExampleGrads, state: Any
) -> None:
    expected = jax.eval_shape(
        lambda key: init(mechanism, "", grads.parameter_specs(), key), jax.eval_shape(lambda: key)
    )
    if _shapes(expected) != _shapes(state):
        raise ValueError(
            f"expected a state of the mechanism {type(mechanism).__name__} for these parameters; "
            "got one of another mechanism, of another strategy or of other parameters. Continue "
            "as that run began, or start a new run with init and count both."
        )


def _shapes(state: PyTree) -> tuple[Any, list[tuple[Any, str]]]:
    leaves, structure = jax.tree.flatten(state)
    return structure, [(jnp.shape(leaf), str(leaf.dtype)) for leaf in leaves]


def _words(identity: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(identity.encode()).digest()[:8], "<u4").astype(np.uint32)
