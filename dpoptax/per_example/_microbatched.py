"""The lazy form: a batch that does not fit, a few examples at a time, as one compiled program.

It keeps the loss, the parameters and the examples; gradients exist for one microbatch at a time.
`clip_and_sum` is one pass; norms and sums asked for separately are a pass each, and so are losses.
A microbatch of padding alone is not worked through.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dpoptax.per_example._base import PerExampleGrads
from dpoptax.per_example._tracing.interpreter import evaluate

# `(loss_fn, params, inputs, mask) -> (losses, grads)`, such as `factored_grads`.
FormOf = Callable[..., tuple[Array, PerExampleGrads]]


class Program:
    """What is static: the loss as a jaxpr, and the form of each microbatch.

    Two programs are equal if they are of one function and it traced alike, so that a compiled
    function is reused. A jaxpr as text tells custom derivatives and callbacks by name alone.
    """

    def __init__(
        self,
        form_of: FormOf,
        loss_fn: Callable[..., Array],
        closed: Any,
        params: PyTree,
        inputs: PyTree,
    ) -> None:
        self.form_of = form_of
        self.jaxpr = closed.jaxpr
        self.specs = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), params
        )
        trees = jax.tree.structure((params, inputs))
        self._loss_fn = loss_fn
        self._signature = (str(closed.jaxpr), trees, form_of)

    def loss_fn(self, constants: list[Array]) -> Callable[..., Array]:
        """The loss of one example, as it was traced."""

        def loss_fn(params: PyTree, *inputs: PyTree) -> Array:
            return evaluate(self.jaxpr, constants, jax.tree.leaves((params, inputs)))

        return loss_fn

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Program)
            and self._signature == other._signature
            and _are_one(self._loss_fn, other._loss_fn)
        )

    def __hash__(self) -> int:
        return hash(self._signature)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MicrobatchedGrads(PerExampleGrads):
    """Per-example gradients to be computed, `microbatch_size` examples at a time.

    Attributes:
        params: the parameters.
        inputs: the examples, and their keys where the loss draws, with a leading axis.
        constants: what the loss closes over.
        mask: bool `(batch,)`; True marks a real example.
        program: what is static.
        microbatch_size: how many gradients exist at once.
    """

    params: PyTree
    inputs: tuple[PyTree, ...]
    constants: list[Array]
    mask: Array
    program: Program = dataclasses.field(metadata={"static": True})
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
        return self.program.specs

    def losses(self) -> Float[Array, " batch"]:
        """Returns the loss of every example; zero for padded rows, or what their content gives."""
        loss_fn = self.program.loss_fn(self.constants)
        return self._map(
            lambda inputs, _: jax.vmap(functools.partial(loss_fn, self.params))(*inputs)
        )

    def _grads(self, inputs: tuple[PyTree, ...], mask: Array) -> PerExampleGrads:
        loss_fn = self.program.loss_fn(self.constants)
        return self.program.form_of(loss_fn, self.params, inputs, mask)[1]

    def _map(self, function: Callable[..., PyTree]) -> PyTree:
        parts = self._split((self.inputs, self.mask))
        one, _ = _unless_empty(function, parts)
        size = len(self.mask)

        def joined(leaf: Array) -> Array:
            return leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])[:size]

        return jax.tree.map(joined, jax.lax.map(one, parts))

    def _sum(self, function: Callable[[PerExampleGrads, Any], PyTree], weights: Any) -> PyTree:
        def whole(inputs: tuple[PyTree, ...], mask: Array, weights: Any) -> PyTree:
            return function(self._grads(inputs, mask), weights)

        parts = self._split((self.inputs, self.mask, weights))
        one, zeros = _unless_empty(whole, parts)
        total, _ = jax.lax.scan(
            lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None), zeros, parts
        )
        return total

    def _split(self, tree: PyTree) -> PyTree:
        """Cuts rows into microbatches; the last is filled up with a row that is masked."""
        size = len(self.mask)
        missing = -size % self.microbatch_size
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
    """Returns a function of one part, `(inputs, mask, ...)`, zero for padding alone; and zeros."""
    shapes = jax.eval_shape(function, *jax.tree.map(lambda leaf: leaf[0], parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def one(part: PyTree) -> PyTree:
        return jax.lax.cond(jnp.any(part[1]), lambda: function(*part), lambda: zeros)

    return one, zeros


def _are_one(function: Any, other: Any) -> bool:
    """Whether two are one function; a method is made anew each time that it is looked up."""
    return function is other or (isinstance(function, types.MethodType) and function == other)


def microbatched_grads(
    form_of: FormOf,
    microbatch_size: int,
    loss_fn: Callable[..., Array],
    params: PyTree,
    inputs: tuple[PyTree, ...],
    mask: Array,
) -> tuple[Array, PerExampleGrads]:
    """Returns the losses and the lazy gradients of a batch.

    Args:
        form_of: the form of each microbatch.
        microbatch_size: how many gradients exist at once.
        loss_fn: the scalar loss of one example, `loss_fn(params, *input)`.
        params: the parameters.
        inputs: the examples, and their keys where the loss draws, with a leading axis.
        mask: bool `(batch,)`.

    Returns:
        Losses `(batch,)`, by a pass of their own, and `MicrobatchedGrads`; the form of the whole
        batch where that is one microbatch.
    """
    if len(mask) <= microbatch_size:
        return form_of(loss_fn, params, inputs, mask)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), inputs)
    closed = jax.make_jaxpr(loss_fn)(params, *one)
    program = Program(form_of, loss_fn, closed, params, inputs)
    constants = list(closed.consts)
    grads = MicrobatchedGrads(params, inputs, constants, mask, program, microbatch_size)
    return grads.losses(), grads
