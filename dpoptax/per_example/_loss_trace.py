"""The loss of one example as a jaxpr, traced once per call and passed to everything that needs it.

Validation, site finding, the stacked form, microbatches and the self-check all read this jaxpr, so
the user's Python function runs once.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array, PyTree

from dpoptax import _jax_compat
from dpoptax.per_example._primitives import may_spread_nan
from dpoptax.per_example._tracing.find_sites import FoundSites, find_sites


class LossProgram:
    """The static part of a traced loss.

    Two programs are equal if they are of one function and have the same jaxpr, so that JAX reuses
    a compiled function. The text of the jaxpr alone is not enough: it shows only the names of
    custom derivatives and callbacks.

    Attributes:
        jaxpr: `(*constants, *parameter leaves, *example leaves) -> loss`.
        params_treedef: the tree of the parameters.
        param_specs: shape and dtype of each parameter leaf.
        param_paths: the name of each parameter leaf.
    """

    def __init__(
        self, loss_fn: Callable[..., Any], jaxpr: Any, params: PyTree, example: tuple[PyTree, ...]
    ) -> None:
        labelled, self.params_treedef = jax.tree_util.tree_flatten_with_path(params)
        self.jaxpr = jaxpr
        self.param_paths = [jax.tree_util.keystr(path) for path, _ in labelled]
        self._loss_fn = loss_fn
        self._example_treedef = jax.tree.structure(example)
        variables, _ = _jax_compat.inputs_of(jaxpr)
        # In the jaxpr the closed-over arrays come first, then parameters, then the example.
        self._num_constants = len(variables) - len(labelled) - len(jax.tree.leaves(example))
        self.param_specs = [
            jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)
            for variable in variables[self._num_constants :][: len(labelled)]
        ]

    @functools.cached_property
    def signature(self) -> tuple[Any, ...]:
        """What decides which sites a loss has: its equations, and its trees."""
        return str(self.jaxpr), self.params_treedef, self._example_treedef

    @functools.cached_property
    def found(self) -> FoundSites:
        """The sites of the loss."""
        # Sites hold shapes and no values, so one search serves every batch and microbatch.
        return find_sites(self.jaxpr, self._num_constants, len(self.param_specs))

    @functools.cached_property
    def may_spread_nan(self) -> bool:
        """Whether `vmap` of the gradient may spread NaN from one example to others."""
        return may_spread_nan(_jax_compat.equations(self.jaxpr))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, LossProgram)
            and self.signature == other.signature
            and _are_one(self._loss_fn, other._loss_fn)
        )

    def __hash__(self) -> int:
        return hash(self.signature)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossTrace:
    """A traced loss and the arrays that it closes over.

    Attributes:
        constants: the arrays.
        program: the static part.
    """

    constants: list[Any]
    program: LossProgram = dataclasses.field(metadata={"static": True})

    def __call__(self, params: PyTree, *example: PyTree) -> Array:
        """Runs the loss of one example."""
        values = jax.tree.leaves((params, example))
        (loss,) = _jax_compat.run_jaxpr(self.program.jaxpr, self.constants, values)
        return loss


def trace_loss(
    loss_fn: Callable[..., Any], params: PyTree, example: Sequence[PyTree]
) -> tuple[LossTrace, PyTree, frozenset[Any]]:
    """Traces `loss_fn(params, *example)`; computes nothing.

    Returns the trace, the shape of what the loss returns, and its side effects.
    """
    closed, loss = jax.make_jaxpr(loss_fn, return_shape=True)(params, *example)
    jaxpr, constants = _jax_compat.split_constants(closed)
    program = LossProgram(loss_fn, jaxpr, params, tuple(example))
    return LossTrace(constants, program), loss, frozenset(closed.effects)


def _are_one(function: Any, other: Any) -> bool:
    # Every access to a method makes a new object, so methods are compared by value.
    return function is other or (isinstance(function, types.MethodType) and function == other)
