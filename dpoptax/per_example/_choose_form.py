"""The automatic choice of a form: the one with the least arithmetic that fits into memory.

Arithmetic is counted in products with parameters, in units of the forward pass of each site.

    plain        1 forward, 1 for its input's cotangent, 1 for the sum
    factored     the same, and the norms
    recomputed   1 for the input's cotangent more, and for short examples the norms once more
    checkpoint   1 more for every backward pass

Memory is what a form holds beyond a plain gradient: factors, held gradients, and stacked ones. It
must fit into a part of the memory of the devices, by the table in `_devices.py`. On a CPU, a batch
whose activations, or looked-up rows, are much larger than the cache is cut into parts, see
`_cached_parts.py`, and others leave out most of their padding, see `_trimmed.py`. The choice
depends only on shapes, on the kind and the number of devices, on whether there is a mesh, and on
how many rows a sampler usually fills, so that a program always makes the same one. All choices give
the same numbers up to rounding.
"""

import dataclasses
import math
from typing import Any, TypeAlias

import jax
from jaxtyping import Array

from dpoptax._pytree import PyTree
from dpoptax.per_example._base import PerExampleGrads
from dpoptax.per_example._cached_parts import size_of_parts
from dpoptax.per_example._devices import current_device
from dpoptax.per_example._factored import Layout
from dpoptax.per_example._loss_trace import LossProgram, LossTrace
from dpoptax.per_example._microbatched import LARGEST_AUTOMATIC, microbatched_grads
from dpoptax.per_example._norm_rules.embedding import EmbeddingLookup
from dpoptax.per_example._norm_rules.materialize import materialization_cost
from dpoptax.per_example._recomputed import one_pass_grads, recomputed_grads
from dpoptax.per_example._stacked import stacked_grads
from dpoptax.per_example._streamed_leaf import HeldLeaf, StreamedLeaf
from dpoptax.per_example._streaming import bytes_of, held_in_scans, streamed_leaves
from dpoptax.per_example._tracing.site import Site
from dpoptax.per_example._trimmed import TrimmedGrads, pays_to_trim

# What a form holds beyond a plain gradient may take this part of the memory of the devices. The
# rest is for parameters, the state of the optimizer, activations and the sum. Not measured.
MEMORY_FRACTION = 0.5

# A form of `per_example_grads`, see there.
FormName: TypeAlias = str
FORMS = {"factored": one_pass_grads, "recomputed": recomputed_grads, "stacked": stacked_grads}


@dataclasses.dataclass(frozen=True)
class LeafCost:
    """What a leaf costs in a form, for one example.

    Attributes:
        flops: of its products in the forward and backward passes, with its norms and its sum.
        num_bytes: that the form holds beyond a plain gradient.
    """

    flops: float
    num_bytes: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """A form for a batch, and why.

    Attributes:
        form: `"factored"`, `"recomputed"` or `"stacked"`.
        microbatch_size: how many examples at a time; None for all.
        reason: one sentence.
        usual_size: how many rows are computed where all others are padding; None for all.
    """

    form: FormName
    microbatch_size: int | None
    reason: str
    usual_size: int | None = None


class FormPlan:
    """How a form treats each leaf of a loss.

    Attributes:
        streamed: the leaves whose norms are read in the backward pass.
        layout: the other leaves.
    """

    def __init__(self, program: LossProgram, form: FormName, batch: int) -> None:
        self.form, self.specs = form, program.param_specs
        self.streamed: dict[int, StreamedLeaf] = {}
        if form == "recomputed":
            self.streamed = streamed_leaves(program, batch)
        elif form == "factored":
            self.streamed = held_in_scans(program, batch)
        self.layout = Layout(program, batch, elsewhere=frozenset(self.streamed))

    def cost(self, leaf: int) -> LeafCost:
        """Returns the cost of a leaf by its number, for one example."""
        spec, sites = self.specs[leaf], self.layout.sites_of(leaf)
        size = math.prod(spec.shape)
        forward = sum(map(_forward, sites))
        # A checkpoint runs the forward pass again for each backward pass.
        again = sum(_forward(site) for site in sites if site.in_checkpoint)
        if leaf in self.layout.fallback_reasons:
            return LeafCost(math.nan, size * spec.dtype.itemsize)
        if self.form == "stacked":
            return LeafCost(3 * forward + again, size * spec.dtype.itemsize)
        # If a leaf needs a second pass, that computes the cotangents of the layers for all.
        passes = 3 * forward + again
        if any(not isinstance(found, HeldLeaf) for found in self.streamed.values()):
            passes += forward + again
        found = self.streamed.get(leaf)
        if isinstance(found, HeldLeaf):
            return LeafCost(passes, 4 * size)
        if found is not None:
            norms = 2 * (found.cost + found.cost_again)
            return LeafCost(passes + norms, sum(map(bytes_of, found.kept)))
        if leaf in self.layout.materialized:
            return LeafCost(passes, 4 * size)
        norms = 2 * self.layout.rules[leaf].cost
        return LeafCost(passes + norms, sum(map(bytes_of, sites)))

    @property
    def bytes_per_example(self) -> float:
        """Returns what all leaves hold for one example."""
        return sum(self.cost(leaf).num_bytes for leaf in range(len(self.specs)))

    @property
    def flops_per_example(self) -> float:
        """Returns the arithmetic of one example in products with parameters that have a rule."""
        flops = [self.cost(leaf).flops for leaf in range(len(self.specs))]
        return sum(number for number in flops if not math.isnan(number))

    @property
    def bytes_of_lookups(self) -> float:
        """Returns what is held for the lookups of one example: indices, and cotangents of rows."""
        lookups = [
            leaf for leaf, rule in self.layout.rules.items() if isinstance(rule, EmbeddingLookup)
        ]
        return sum(self.cost(leaf).num_bytes for leaf in lookups)


def _forward(site: Site) -> float:
    # The parameter is one slice of the leaf.
    return 2 * site.num_slices * materialization_cost([site.equation], site.parameter)


def choose(
    program: LossProgram, batch: int, *, in_parts: bool = True, usual_size: int | None = None
) -> Choice:
    """Returns the form of a batch of this size.

    Args:
        program: the loss.
        batch: how many rows the batch has.
        in_parts: whether the batch may be cut because this is faster. If it is not, it is cut only
            where memory demands it.
        usual_size: how many rows are not padding in most batches; None for all.
    """
    usual = batch if usual_size is None else usual_size
    streamed = streamed_leaves(program, batch)
    form, reason = _whole(streamed)
    num_devices = jax.device_count()
    # A batch that all devices share equally takes this part of the memory of each.
    budget = MEMORY_FRACTION * current_device().memory * num_devices
    plan = FormPlan(program, form, batch)
    needed = plan.bytes_per_example
    # If not even one example per device fits, nothing but a second backward pass helps.
    if form == "factored" and streamed and needed * num_devices > budget:
        form = "recomputed"
        reason = "the factors of one example do not fit into memory"
        needed = FormPlan(program, form, batch).bytes_per_example
    if form == "factored" and in_parts:
        flops, lookups = plan.flops_per_example, plan.bytes_of_lookups
        size = size_of_parts(program, batch, flops, lookups, usual=usual)
        if size is not None and needed * size <= budget:
            return Choice(form, size, f"{reason}; a part of the batch waits less for memory")
    if needed * batch <= budget:
        if usual < batch and pays_to_trim(plan.flops_per_example * (batch - usual)):
            return Choice(form, None, f"{reason}; most padding is left out", usual)
        return Choice(form, None, reason)
    fitting = max(1, min(int(budget / needed), LARGEST_AUTOMATIC))
    size = max(num_devices, 2 ** (fitting.bit_length() - 1))
    if size >= batch:
        return Choice(form, None, reason)
    return Choice(form, size, f"{reason}; the whole batch does not fit into memory")


def _whole(streamed: dict[int, StreamedLeaf]) -> tuple[FormName, str]:
    """Returns the form of a batch that fits into memory, and why."""
    # Factors are kept for all layers at once. Whoever wrapped a layer into `jax.checkpoint` asked
    # for less memory than that, and accepted to compute the layer twice.
    if any(site.in_checkpoint for leaf in streamed.values() for site in leaf.sites):
        return "recomputed", "the loss uses jax.checkpoint, which keeping factors would undo"
    return "factored", "one backward pass"


def automatic_grads(
    trace: LossTrace,
    params: PyTree,
    inputs: tuple[PyTree, ...],
    mask: Array,
    *,
    in_parts: bool = True,
    usual_size: int | None = None,
) -> tuple[Any, PerExampleGrads]:
    """Returns the losses `(batch,)` and the gradients, as `choose` says."""
    choice = choose(trace.program, len(mask), in_parts=in_parts, usual_size=usual_size)
    form_of = FORMS[choice.form]
    if choice.usual_size is not None:
        return None, TrimmedGrads(trace, params, inputs, mask, form_of, choice.usual_size)
    if choice.microbatch_size is None:
        return form_of(trace, params, inputs, mask)
    return microbatched_grads(form_of, choice.microbatch_size, None, trace, params, inputs, mask)


def automatic_grads_of_part(
    trace: LossTrace, params: PyTree, inputs: tuple[PyTree, ...], mask: Array
) -> tuple[Any, PerExampleGrads]:
    """The same for a microbatch, whose size the user has chosen."""
    form_of = FORMS[choose(trace.program, len(mask)).form]
    return form_of(trace, params, inputs, mask)
