"""Microbatched gradients: a large batch in one compiled program, a few examples at a time.

Microbatches with only padding are skipped.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpoptax._pytree import PyTree
from dpoptax.per_example._base import PerExampleGrads, Values, register_form
from dpoptax.per_example._batch_sum import fold_and_stack, longest_run
from dpoptax.per_example._deferred import DeferredGrads, FormOf
from dpoptax.per_example._loss_trace import LossTrace
from dpoptax.per_example._parts import Parts, parts_of

# A larger part would move the sum further than docs/numerics.md says: the total of a part is
# rounded to float32, by at most 4 u times its size.
LARGEST_AUTOMATIC = 4096


@register_form
@dataclasses.dataclass(frozen=True, repr=False)
class MicrobatchedGrads(DeferredGrads):
    """Per-example gradients that are computed when needed, one microbatch at a time.

    Attributes:
        parts: how the batch is cut into microbatches.
    """

    parts: Parts = dataclasses.field(metadata={"static": True})

    def _loop(
        self, function: Callable[..., tuple[PyTree, PyTree]], rows: PyTree = None
    ) -> tuple[PyTree, PyTree]:
        """See `DeferredGrads._loop`."""
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
