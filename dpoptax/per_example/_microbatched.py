"""Microbatched gradients: a large batch in one compiled program, a few examples at a time.

This form holds the loss, the parameters and the examples, and computes gradients when they are
needed, one microbatch at a time. `clip_and_sum` is one pass over the batch, and so are
`squared_norms` and `weighted_sum`. Each pass also gives the losses, and each but the last the
norms: they are remembered, so that no pass is made for them again. Microbatches with only padding
are skipped.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax._jax_compat import current_trace
from dpoptax._pytree import PyTree
from dpoptax.per_example._base import PerExampleGrads, Values, register_form
from dpoptax.per_example._batch_sum import fold_and_stack, longest_run
from dpoptax.per_example._counted import KnownNorms
from dpoptax.per_example._leaf_weights import weights_by_leaf
from dpoptax.per_example._loss_trace import LossTrace
from dpoptax.per_example._parts import Parts, parts_of

# A larger part would move the sum further than docs/numerics.md says: the total of a part is
# rounded to float32, by at most 4 u times its size.
LARGEST_AUTOMATIC = 4096

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


@register_form
@dataclasses.dataclass(frozen=True, repr=False)
class MicrobatchedGrads(PerExampleGrads):
    """Per-example gradients that are computed when needed, one microbatch at a time.

    Attributes:
        trace: the loss of one example.
        params: the parameters.
        inputs: the examples, and one key per example if the loss takes a key, with a leading axis.
        mask: bool `(batch,)`; True marks a real example.
        form_of: computes the gradients of a microbatch.
        parts: how the batch is cut into microbatches.
    """

    trace: LossTrace
    params: PyTree
    inputs: tuple[PyTree, ...]
    mask: Array
    form_of: FormOf = dataclasses.field(metadata={"static": True})
    parts: Parts = dataclasses.field(metadata={"static": True})

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

    def _loop(
        self, function: Callable[..., tuple[PyTree, PyTree]], rows: PyTree = None
    ) -> tuple[PyTree, PyTree]:
        """Returns the sum of the first results of all parts, and the second ones by example."""
        parts = self.parts
        cut, mask = parts.cut((self.inputs, rows)), parts.is_real(self.mask)

        def whole(number: Array) -> tuple[PyTree, PyTree]:
            inputs, share = parts.part(cut, number)
            return function(inputs, parts.part(mask, number), share)

        count = mask.shape[1]
        # Turns without a part fill the last run: runs of one length are cheaper than short ones.
        missing = -count % min(longest_run(parts.size), count)
        numbers = jnp.arange(count + missing)
        shapes = jax.eval_shape(whole, numbers[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        used = jnp.pad(jnp.any(mask, axis=(0, 2)), (0, missing))

        # Inside a loop a cond stays a branch, so a part with only padding costs nothing.
        def one(number: Array) -> tuple[PyTree, PyTree]:
            return jax.lax.cond(used[number], lambda: whole(number), lambda: zeros)

        # A scan holds one running sum; a map would hold one sum per microbatch.
        total, outputs = fold_and_stack(one, numbers, parts.size)
        outputs = jax.tree.map(lambda leaf: leaf[:count], outputs)
        return total, parts.join(outputs, len(self.mask))


def microbatched_grads(
    form_of: FormOf,
    microbatch_size: int,
    shards: int | None,
    trace: LossTrace,
    params: PyTree,
    inputs: tuple[PyTree, ...],
    mask: Array,
) -> tuple[Values | None, PerExampleGrads]:
    """Returns the microbatched gradients of a batch; `MicrobatchedGrads.values` has the values.

    A batch that fits into one microbatch takes the form of that microbatch, and has its values.
    """
    # A loop of one step would only keep XLA from fusing across it.
    if len(mask) <= microbatch_size:
        return form_of(trace, params, inputs, mask)
    parts = parts_of(inputs[0], len(mask), microbatch_size, shards)
    return None, MicrobatchedGrads(trace, params, inputs, mask, form_of, parts)
