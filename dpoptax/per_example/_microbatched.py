"""Microbatched gradients: a large batch in one compiled program, a few examples at a time.

This form holds the loss, the parameters and the examples, and computes gradients when they are
needed, one microbatch at a time. `clip_and_sum` is one pass over the batch. Norms, sums and losses
that are computed separately take one pass each. Microbatches with only padding are skipped.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dpoptax.per_example._base import PerExampleGrads
from dpoptax.per_example._loss_trace import LossTrace

# `(trace, params, inputs, mask) -> (losses, grads)`, such as `factored_grads`.
FormOf: TypeAlias = Callable[..., tuple[Array, PerExampleGrads]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MicrobatchedGrads(PerExampleGrads):
    """Per-example gradients that are computed when needed, `microbatch_size` examples at a time.

    Attributes:
        trace: the loss of one example.
        params: the parameters.
        inputs: the examples, and one key per example if the loss takes a key, with a leading axis.
        mask: bool `(batch,)`; True marks a real example.
        form_of: computes the gradients of a microbatch.
        microbatch_size: how many gradients exist at once.
    """

    trace: LossTrace
    params: PyTree
    inputs: tuple[PyTree, ...]
    mask: Array
    form_of: FormOf = dataclasses.field(metadata={"static": True})
    microbatch_size: int = dataclasses.field(metadata={"static": True})

    def squared_norms(self) -> PyTree[Float[Array, " batch"]]:
        """See `PerExampleGrads.squared_norms`."""
        return self._map(lambda *part: self._grads(*part).squared_norms())

    def weighted_sum(self, weights: Float[Array, " batch"]) -> PyTree[Float[Array, "..."]]:
        """See `PerExampleGrads.weighted_sum`."""
        return self._sum(lambda grads, part: grads.weighted_sum(part), weights)

    def sum_by_parts(self, function: Callable[[PerExampleGrads], PyTree]) -> PyTree:
        """See `PerExampleGrads.sum_by_parts`; one pass over the batch."""
        return self._sum(lambda grads, _: function(grads), None)

    def stacked(self) -> PyTree[Float[Array, "batch ..."]]:
        """See `PerExampleGrads.stacked`."""
        return self._map(lambda *part: self._grads(*part).stacked())

    def parameter_specs(self) -> PyTree:
        """See `PerExampleGrads.parameter_specs`."""
        program = self.trace.program
        return jax.tree.unflatten(program.params_treedef, program.param_specs)

    def losses(self) -> Float[Array, " batch"]:
        """Returns the loss of every example. The loss of a padded row has no meaning."""
        return self._map(
            lambda inputs, _: jax.vmap(functools.partial(self.trace, self.params))(*inputs)
        )

    def _grads(self, inputs: tuple[PyTree, ...], mask: Array) -> PerExampleGrads:
        return self.form_of(self.trace, self.params, inputs, mask)[1]

    def _map(self, function: Callable[..., PyTree]) -> PyTree:
        parts = self._split((self.inputs, self.mask))
        one, _ = _unless_empty(function, parts)
        size = len(self.mask)

        def join(leaf: Array) -> Array:
            return leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])[:size]

        return jax.tree.map(join, jax.lax.map(one, parts))

    def _sum(self, function: Callable[[PerExampleGrads, Any], PyTree], weights: Any) -> PyTree:
        def whole(inputs: tuple[PyTree, ...], mask: Array, weights: Any) -> PyTree:
            return function(self._grads(inputs, mask), weights)

        parts = self._split((self.inputs, self.mask, weights))
        one, zeros = _unless_empty(whole, parts)
        # A scan holds one running sum; a map would hold one sum per microbatch.
        total, _ = jax.lax.scan(
            lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None), zeros, parts
        )
        return total

    def _split(self, tree: PyTree) -> PyTree:
        """Cuts rows into microbatches; masked copies of the last row fill the last one."""
        size = len(self.mask)
        missing = -size % self.microbatch_size
        # Copies of a real row, because zeros may be outside of what the loss accepts.
        rows = jnp.minimum(jnp.arange(size + missing), size - 1)

        def split(leaf: Array) -> Array:
            filled = leaf[rows] if missing else leaf
            parts = (size + missing) // self.microbatch_size
            return filled.reshape(parts, self.microbatch_size, *leaf.shape[1:])

        inputs, mask, *rest = jax.tree.map(split, tree)
        real = (jnp.arange(size + missing) < size).reshape(mask.shape)
        return (inputs, mask & real, *rest)


def _unless_empty(
    function: Callable[..., PyTree], parts: PyTree
) -> tuple[Callable[[PyTree], PyTree], PyTree]:
    """Returns `function` of one part `(inputs, mask, ...)`, but zeros for a part with only padding.

    The zeros themselves follow.
    """
    shapes = jax.eval_shape(function, *jax.tree.map(lambda leaf: leaf[0], parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    # Inside a loop a cond stays a branch, so a part with only padding costs nothing.
    def one(part: PyTree) -> PyTree:
        return jax.lax.cond(jnp.any(part[1]), lambda: function(*part), lambda: zeros)

    return one, zeros


def microbatched_grads(
    form_of: FormOf,
    microbatch_size: int,
    trace: LossTrace,
    params: PyTree,
    inputs: tuple[PyTree, ...],
    mask: Array,
) -> tuple[Array, PerExampleGrads]:
    """Returns the losses `(batch,)` and the microbatched gradients of a batch.

    A batch that fits into one microbatch takes the form of that microbatch.
    """
    # A loop of one step would only keep XLA from fusing across it.
    if len(mask) <= microbatch_size:
        return form_of(trace, params, inputs, mask)
    grads = MicrobatchedGrads(trace, params, inputs, mask, form_of, microbatch_size)
    return grads.losses(), grads


def aux_of_batch(
    trace: LossTrace, params: PyTree, inputs: tuple[PyTree, ...], microbatch_size: int | None
) -> PyTree:
    """Returns the auxiliary outputs of all examples, with a leading axis of `(batch, ...)`."""

    def of_example(inputs: tuple[PyTree, ...]) -> PyTree:
        return trace.aux(params, *inputs)

    size = len(jax.tree.leaves(inputs)[0])
    if microbatch_size is None or size <= microbatch_size:
        return jax.vmap(of_example)(inputs)
    return jax.lax.map(of_example, inputs, batch_size=microbatch_size)
