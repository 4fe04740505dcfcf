"""Digest of the program of a run: of the loss's gradient and of the update, not of their layout.

The lowered program contains every constant that a loss or an optimizer captured, such as a learning
rate. It is lowered for one example on one device, so microbatches and devices do not change it.
"""

import collections
import hashlib
import secrets
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from dpoptax import _markers
from dpoptax._jax_compat import constants_inside, equations, run_jaxpr, split_constants
from dpoptax._pytree import PyTree
from dpoptax.per_example._stacked import StackedGrads
from dpoptax.training._multihost import from_first_process
from dpoptax.training._objective import Objective
from dpoptax.training._resume.fingerprint import local_arrays


class ProgramDigest:
    """Digests of the program of one loss and one transformation, remembered by shapes."""

    def __init__(
        self, loss_fn: Callable[..., Any] | Objective | None, tx: optax.GradientTransformation
    ) -> None:
        self.loss_fn = loss_fn
        self.tx = tx
        self._known: dict[Any, str] = {}
        # None where nobody asks for them: they may be large, or tracers.
        self._constants_of_update: list[Any] | None = None

    def __call__(
        self,
        point: PyTree,
        examples: PyTree,
        key: Array | None,
        params: PyTree,
        opt_state: optax.OptState,
    ) -> tuple[str, list[Array]]:
        """Returns a text, and the traced arrays that the program captured.

        Args:
            point: where the gradients are taken; here and below only shapes and dtypes matter.
            examples: with a leading axis.
            key: the key of the loss, or None if it takes none.
            params: the parameters.
            opt_state: the state of the transformation.
        """
        if _markers.active():
            return "", []  # the trace has equations that cannot be lowered
        example = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), examples
        )
        specs = jax.tree.map(_spec, (point, example, key, params, opt_state))
        known = (jax.tree.structure(specs), tuple(map(str, jax.tree.leaves(specs))))
        if known not in self._known:
            text, captured = self._compute(*specs)
            if captured:  # tracers belong to one trace only
                return text, captured
            self._known[known] = text
        return self._known[known], []

    def take_constants_of_update(self) -> list[Any]:
        """Returns the arrays that the update closes over, once, for `start_digest`."""
        found, self._constants_of_update = self._constants_of_update, None
        return found or []

    def _compute(
        self, point: PyTree, example: PyTree, key: Any, params: PyTree, opt_state: Any
    ) -> tuple[str, list[Array]]:
        keys = () if key is None else (key,)
        one = jax.tree.map(lambda spec: jax.ShapeDtypeStruct((1, *spec.shape), spec.dtype), point)
        grads = jax.eval_shape(StackedGrads, one, jax.ShapeDtypeStruct((1,), jnp.bool_))
        parts: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
            (self.tx.update, (grads, opt_state, params))
        ]
        loss_of = self.loss_fn.loss if isinstance(self.loss_fn, Objective) else self.loss_fn
        if loss_of is not None:
            parts.append((_gradient_of(loss_of), (point, example, *keys)))
        found = [_lower(function, specs) for function, specs in parts]
        texts = "".join(text for text, *_ in found)
        if self._constants_of_update is not None:
            self._constants_of_update = found[0][2]
        return (
            hashlib.sha256(texts.encode()).hexdigest(),
            [array for _, traced, _ in found for array in traced],
        )


# `fit` needs a digest before it has a step, and the step needs it again.
_started: collections.deque[ProgramDigest] = collections.deque(maxlen=4)


def start_digest(
    loss_fn: Callable[..., Any] | Objective | None, tx: optax.GradientTransformation
) -> ProgramDigest:
    """Returns new digests, which the next step of this loss and this transformation takes over."""
    digest = ProgramDigest(loss_fn, tx)
    digest._constants_of_update = []
    _started.append(digest)
    return digest


def take_over_digest(
    loss_fn: Callable[..., Any] | Objective | None, tx: optax.GradientTransformation
) -> ProgramDigest:
    """Returns the digests that were started for a loss and a transformation, or else new ones.

    Only once: by the time of another step, what the loss captured may have changed.
    """
    for known in _started:
        if known.loss_fn is loss_fn and known.tx is tx:
            _started.remove(known)
            return known
    return ProgramDigest(loss_fn, tx)


def _gradient_of(loss_fn: Callable[..., Any]) -> Callable[..., PyTree]:
    def scalar(*arguments: Any) -> Array:
        # Without metrics that the loss may return too: they are not released with the noise.
        return jnp.sum(jax.tree.leaves(loss_fn(*arguments))[0])

    return jax.grad(scalar)


def _lower(
    function: Callable[..., Any], specs: tuple[Any, ...]
) -> tuple[str, list[Array], list[Any]]:
    """Returns a digest of a lowered function and its known constants.

    Also returns the traced constants, and all constants.
    """
    everything: list[Any] = []
    try:
        jaxpr, constants = split_constants(jax.make_jaxpr(function)(*specs))
        lowered = jax.jit(lambda constants, values: run_jaxpr(jaxpr, constants, values)).lower(
            list(map(_spec, constants)), list(map(_spec, jax.tree.leaves(specs)))
        )
        text = lowered.as_text()
        complete = _is_complete(jaxpr)
        everything = [*constants, *constants_inside(jaxpr)]
    except Exception:  # as many reasons as there are primitives; a fault of the loss shows later
        text, constants, complete = "", [], False
    if not complete:
        # A random part: such a run never repeats the noise of another.
        text += str(from_first_process(secrets.randbits(31)))
    digest = hashlib.sha256(text.encode())
    traced: list[Array] = []
    for array in constants:
        if isinstance(array, jax.core.Tracer):
            traced.append(array)
            continue
        for part in local_arrays(array):
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return digest.hexdigest(), traced, everything


def _is_complete(jaxpr: Any) -> bool:
    """Whether the lowered text of a jaxpr says all that it computes."""
    if getattr(jax.config, "jax_use_simplified_jaxpr_constants", False):
        return False
    names = {eqn.primitive.name for eqn in equations(jaxpr)}
    # The text does not contain the Python function behind a callback. One that only prints
    # changes no number.
    return not any("callback" in name and not name.startswith("debug") for name in names)


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
    weak = getattr(leaf, "weak_type", False)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), weak_type=weak)
