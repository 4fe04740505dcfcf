"""Deferred gradients: forms that compute the gradients of a batch when they are needed.

A deferred form holds the loss, the parameters and the examples. `clip_and_sum` is one pass over the
batch, and so are `squared_norms` and `weighted_sum`. Each pass also gives the losses, and each but
the last the norms: they are remembered, so that no pass is made for them again. How a pass goes
through the batch is up to the form.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
from jaxtyping import Array, Float

from dpoptax._jax_compat import current_trace
from dpoptax._pytree import PyTree
from dpoptax.per_example._base import PerExampleGrads, Values
from dpoptax.per_example._counted import KnownNorms
from dpoptax.per_example._leaf_weights import weights_by_leaf
from dpoptax.per_example._loss_trace import LossTrace

# `(trace, params, inputs, mask) -> (values, grads)`, such as `factored_grads`. The values are None
# if they come with a later pass.
FormOf: TypeAlias = Callable[..., tuple[Values | None, PerExampleGrads]]


class Readings(NamedTuple):
    """What a pass over the batch finds out about each example.

    Attributes:
        values: the losses and the auxiliary outputs. Those of a padded row have no meaning.
        norms: the squared norms by leaf; None if the pass did not compute them.
    """

    values: Values
    norms: PyTree | None


@dataclasses.dataclass(frozen=True, repr=False)
class DeferredGrads(PerExampleGrads):
    """Per-example gradients that are computed when needed.

    Attributes:
        trace: the loss of one example.
        params: the parameters.
        inputs: the examples, and one key per example if the loss takes a key, with a leading axis.
        mask: bool `(batch,)`; True marks a real example.
        form_of: computes the gradients of a batch, or of a part of it.
    """

    trace: LossTrace
    params: PyTree
    inputs: tuple[PyTree, ...]
    mask: Array
    form_of: FormOf = dataclasses.field(metadata={"static": True})

    def squared_norms(self) -> PyTree[Float[Array, " batch"]]:
        """See `PerExampleGrads.squared_norms`."""
        known = self.readings()
        if known is not None and known.norms is not None:
            return known.norms
        _, norms = self._pass(lambda part, _: (None, part.squared_norms()), has_norms=True)
        return norms

    def weighted_sum(self, weights: PyTree[Float[Array, " batch"]]) -> PyTree[Float[Array, "..."]]:
        """See `PerExampleGrads.weighted_sum`."""
        weights_by_leaf(weights, self.trace.program.params_treedef, self.mask)  # to check them
        return self._pass(lambda part, weights: (part.weighted_sum(weights), None), weights)[0]

    def sum_with_rows(
        self, function: Callable[[PerExampleGrads, Any], PyTree], rows: PyTree
    ) -> PyTree:
        """See `PerExampleGrads.sum_with_rows`; one pass over the batch, as `clip_and_sum` is."""

        def of_part(part: PerExampleGrads, rows: PyTree) -> tuple[PyTree, PyTree]:
            known = KnownNorms(part)
            # The norms too, if the function has asked for them.
            return function(known, rows), known.norms

        return self._pass(of_part, rows, has_norms=True)[0]

    def stacked(self) -> PyTree[Float[Array, "batch ..."]]:
        """See `PerExampleGrads.stacked`."""
        return self._pass(lambda part, _: (None, part.stacked()))[1]

    def parameter_specs(self) -> PyTree:
        """See `PerExampleGrads.parameter_specs`."""
        program = self.trace.program
        return jax.tree.unflatten(program.params_treedef, program.param_specs)

    def values(self) -> Values:
        """Returns the values of the loss, from a pass that was made already if there is one."""
        known = self.readings()
        if known is not None:
            return known.values
        # A compiler removes the norms from this pass if nobody reads them, unless a gradient that
        # is not finite changes how the losses are computed, see `each_example`.
        leaves = jax.tree.leaves((self.params, self.inputs))
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        if traced and not self.trace.program.may_spread_nan:
            self.squared_norms()
            return self.values()
        return self._loop(lambda inputs, *_: (None, self._values(inputs)))[1]

    def readings(self) -> Readings | None:
        """Returns what the passes so far have found; None if there was none."""
        state, readings = self.__dict__.get("_known", (None, None))
        # Values of one trace have no meaning in another.
        return readings if state == current_trace() else None

    def remember(self, readings: Readings | None) -> None:
        """Stores what a pass has found, for the trace that is running."""
        known = self.readings()
        if readings is not None and (readings.norms is not None or known is None):
            # In the dict, because the fields are frozen, and what is stored here is not one.
            self.__dict__["_known"] = current_trace(), readings

    def _values(self, inputs: tuple[PyTree, ...]) -> Values:
        return Values(*jax.vmap(lambda inputs: self.trace(self.params, *inputs))(inputs))

    def _pass(
        self,
        function: Callable[[PerExampleGrads, Any], tuple[PyTree, PyTree]],
        rows: PyTree = None,
        *,
        has_norms: bool = False,
    ) -> tuple[PyTree, PyTree]:
        """As `_loop`, for a function of the gradients of a part and its share of `rows`."""

        def of_part(inputs: tuple[PyTree, ...], mask: Array, rows: Any) -> tuple[PyTree, Any]:
            values, grads = self.form_of(self.trace, self.params, inputs, mask)
            total, output = function(grads, rows)
            return total, (values, output)

        total, (values, output) = self._loop(of_part, rows)
        self.remember(Readings(values, output if has_norms else None))
        return total, output

    @abc.abstractmethod
    def _loop(
        self, function: Callable[..., tuple[PyTree, PyTree]], rows: PyTree = None
    ) -> tuple[PyTree, PyTree]:
        """Returns the sum of the first results of all parts, and the second ones by example.

        `function(inputs, mask, rows)` gets a part of each.
        """
