"""The automatic choice between factored, recomputed and stacked gradients."""

from typing import Any

from jaxtyping import Array, PyTree

from dpoptax.per_example._base import PerExampleGrads
from dpoptax.per_example._factored import factored_grads
from dpoptax.per_example._loss_trace import LossProgram, LossTrace
from dpoptax.per_example._recomputed import recomputed_grads, streamed_sites
from dpoptax.per_example._small_gradients import are_small
from dpoptax.per_example._stacked import stacked_grads


def automatic_grads(
    trace: LossTrace, params: PyTree, inputs: tuple[PyTree, ...], mask: Array
) -> tuple[Any, PerExampleGrads]:
    """Returns the losses `(batch,)` and the gradients, in the cheapest form."""
    if are_small(trace.program):
        return stacked_grads(trace, params, inputs, mask)
    form_of = recomputed_grads if is_recomputed(trace.program) else factored_grads
    return form_of(trace, params, inputs, mask)


def is_recomputed(program: LossProgram) -> bool:
    """Whether the automatic form of a loss is the recomputed one."""
    if are_small(program):
        return False
    # Factors are kept for all layers at once. Whoever wrapped a layer into `jax.checkpoint` asked
    # for less memory than that, and accepted to compute the layer twice.
    return any(site.in_checkpoint for site in streamed_sites(program).values())
