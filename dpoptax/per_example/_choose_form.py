"""The automatic choice between factored and recomputed gradients."""

from typing import Any

from jaxtyping import Array, PyTree

from dpoptax.per_example._base import PerExampleGrads
from dpoptax.per_example._factored import factored_grads
from dpoptax.per_example._loss_trace import LossProgram, LossTrace
from dpoptax.per_example._recomputed import recomputed_grads, streamed_leaves


def automatic_grads(
    trace: LossTrace, params: PyTree, inputs: tuple[PyTree, ...], mask: Array
) -> tuple[Any, PerExampleGrads]:
    """Returns the losses `(batch,)` and the gradients, in the form that `is_recomputed` says."""
    form_of = recomputed_grads if is_recomputed(trace.program) else factored_grads
    return form_of(trace, params, inputs, mask)


def is_recomputed(program: LossProgram) -> bool:
    """Whether the automatic form of a loss is the recomputed one."""
    # Factors are kept for all layers at once. Whoever wrapped a layer into `jax.checkpoint` asked
    # for less memory than that, and accepted to compute the layer twice.
    return any(leaf.site.in_checkpoint for leaf in streamed_leaves(program).values())
