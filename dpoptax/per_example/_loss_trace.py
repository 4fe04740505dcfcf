"""The loss of one example as a jaxpr, traced once per call and passed to everything that needs it.

Validation, site finding, the stacked form, microbatches and the self-check all read this jaxpr, so
the user's Python function runs once.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array

from dpoptax import _jax_compat
from dpoptax._pytree import PyTree
from dpoptax.per_example._primitives import may_spread_nan, needs_own_run
from dpoptax.per_example._tracing.find_sites import FoundSites, find_sites
from dpoptax.per_example._tracing.influence import Influence
from dpoptax.per_example._tracing.interpreter import Walker
from dpoptax.per_example._tracing.visitors import PlainRunner


class LossProgram:
    """The static part of a traced loss.

    Two programs are equal if they are of one function and have the same jaxpr, so that JAX reuses
    a compiled function. The text of the jaxpr alone is not enough: it shows only the names of
    custom derivatives and callbacks.

    Attributes:
        jaxpr: `(*constants, *parameter leaves, *example leaves) -> (loss, *aux leaves)`.
        num_constants: how many of its inputs are constants: the arrays that the loss closes over.
        aux_treedef: the tree of the auxiliary outputs; None if there are none.
        params_treedef: the tree of the parameters.
        param_specs: shape and dtype of each parameter leaf.
        param_paths: the name of each parameter leaf.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        jaxpr: Any,
        params: PyTree,
        example: tuple[PyTree, ...],
        aux_treedef: Any = None,
    ) -> None:
        labelled, self.params_treedef = jax.tree_util.tree_flatten_with_path(params)
        self.jaxpr, self.aux_treedef = jaxpr, aux_treedef
        self.param_paths = [jax.tree_util.keystr(path) for path, _ in labelled]
        self._loss_fn = loss_fn
        self._example_treedef = jax.tree.structure(example)
        variables, _ = _jax_compat.inputs_of(jaxpr)
        # In the jaxpr the closed-over arrays come first, then parameters, then the example.
        self.num_constants = len(variables) - len(labelled) - len(jax.tree.leaves(example))
        self.param_specs = [
            jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)
            for variable in variables[self.num_constants :][: len(labelled)]
        ]

    @functools.cached_property
    def signature(self) -> tuple[Any, ...]:
        """What decides which sites a loss has: its equations, and its trees."""
        return str(self.jaxpr), self.params_treedef, self._example_treedef, self.aux_treedef

    @functools.cached_property
    def found(self) -> FoundSites:
        """The sites of the loss."""
        # Sites hold shapes and no values, so one search serves every batch and microbatch.
        return find_sites(self.jaxpr, self.num_constants, len(self.param_specs))

    @functools.cached_property
    def unused_params(self) -> list[str]:
        """The names of the parameters whose gradient is zero for every example and every value."""
        influence = Influence(by_derivative=True)
        variables, _ = _jax_compat.inputs_of(self.jaxpr)
        leaves = range(len(self.param_specs))
        # Bit number `leaf` stands for a parameter; constants and the example have no bit.
        entering = [0] * len(variables)
        for leaf in leaves:
            entering[self.num_constants + leaf] = 1 << leaf
        loss, *_ = influence.outputs(self.jaxpr, entering)
        if not influence.is_complete:
            return []
        return [
            self.param_paths[leaf]
            for leaf in leaves
            if not loss >> leaf & 1 and math.prod(self.param_specs[leaf].shape)
        ]

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

    def __call__(self, params: PyTree, *example: PyTree) -> tuple[Array, list[Array]]:
        """Returns the loss of one example, and the leaves of its auxiliary outputs."""
        values = jax.tree.leaves((params, example))
        loss, *aux = _run(self.program.jaxpr, self.constants, values)
        return loss, aux

    def unchanged(self, params: PyTree, *example: PyTree) -> tuple[Array, list[Array]]:
        """Returns the same by the equations as they are: `vmap` may have no rule for them."""
        values = jax.tree.leaves((params, example))
        loss, *aux = _jax_compat.run_jaxpr(self.program.jaxpr, self.constants, values)
        return loss, aux


def _run(jaxpr: Any, constants: list[Any], values: list[Any]) -> list[Any]:
    """Runs a loss so that `vmap` works, and so that it is fast."""
    if needs_own_run(_jax_compat.equations(jaxpr)):
        return Walker(PlainRunner(), taps={}).run(jaxpr, [*constants, *values], ())[0]
    return _jax_compat.run_jaxpr(jaxpr, constants, values)


def trace_loss(
    loss_fn: Callable[..., Any],
    params: PyTree,
    example: Sequence[PyTree],
    has_aux: bool | None = False,
) -> tuple[LossTrace, PyTree, frozenset[Any]]:
    """Traces `loss_fn(params, *example)`; computes nothing.

    Returns the trace, the shape of what the loss returns, and its side effects.
    """
    closed, output = jax.make_jaxpr(loss_fn, return_shape=True)(params, *example)
    jaxpr, constants = _jax_compat.split_constants(closed)
    # What is no pair with a scalar first is refused later.
    aux = has_aux is not False and is_pair(output) and getattr(output[0], "shape", None) == ()
    aux_treedef = jax.tree.structure(output[1]) if aux else None
    program = LossProgram(loss_fn, jaxpr, params, tuple(example), aux_treedef)
    return LossTrace(constants, program), output, frozenset(closed.effects)


def is_pair(output: Any) -> bool:
    """Whether a loss returned `(loss, aux)`."""
    return isinstance(output, tuple) and len(output) == 2


def _are_one(function: Any, other: Any) -> bool:
    # Every access to a method makes a new object, so methods are compared by value.
    return function is other or (isinstance(function, types.MethodType) and function == other)
