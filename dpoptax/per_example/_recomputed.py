"""Recomputed gradients: two backward passes instead of factors in memory ("ghost clipping").

The first backward pass computes the norms of the per-example gradients, layer by layer, and drops
the factors. The second one computes the weighted sum. Both start from one forward pass. The memory
is that of a plain step, also inside `jax.checkpoint` and `jax.lax.scan`, where factors would have
to be kept for all layers.

Leaves whose uses must be seen together, such as weights shared over time, keep their factors, and
leaves without a norm rule keep their gradients, as in the factored form. A tied table keeps what
its lookup needs, but not the cotangents of its product.

Li et al. 2022 (arXiv:2110.05679) and Bu et al. 2023 (arXiv:2210.00038) scale the losses in the
second pass. Here the weights are multiplied in float32 or wider where the sum is formed. So a small
weight is not rounded to 16 bits on its way through the layers. The layers may be rounded
differently in the two passes: see `_streamed_leaf.py` for why no gradient escapes its clip.
"""

import dataclasses
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax._pytree import PyTree
from dpoptax.per_example._base import PerExampleGrads, Values, register_form, select
from dpoptax.per_example._factored import FactoredGrads, Layout, factored_grads, hold
from dpoptax.per_example._leaf_weights import weights_by_leaf
from dpoptax.per_example._loss_trace import LossTrace
from dpoptax.per_example._norm_rules import Factors
from dpoptax.per_example._streamed_leaf import HeldLeaf, Message, StreamedLeaf
from dpoptax.per_example._streamed_site import (
    SiteZeros,
    StreamRunner,
    zeros_key,
    zeros_of,
)
from dpoptax.per_example._streaming import held_in_scans, streamed_leaves
from dpoptax.per_example._tracing.concatenated import cut
from dpoptax.per_example._tracing.find_sites import run_with_taps
from dpoptax.per_example._tracing.site import EqnPath, Site, tap_spec

AllFactors: TypeAlias = dict[EqnPath, Factors]


@register_form
@dataclasses.dataclass(frozen=True, repr=False)
class RecomputedGrads(PerExampleGrads):
    """Per-example gradients as norms, and a function that runs the backward pass again.

    Attributes:
        norms: by leaf, the squared norms `(batch,)` of streamed leaves.
        pull: from the weights of the examples, by leaf, to the sums of the streamed leaves.
        kept: the other leaves.
        mask: bool `(batch,)`; True marks a real example.
    """

    norms: dict[int, Array]
    pull: Any
    kept: FactoredGrads
    mask: Array

    def squared_norms(self) -> PyTree[Float[Array, " batch"]]:
        """See `PerExampleGrads.squared_norms`."""
        streamed = {leaf: select(self.mask, norms) for leaf, norms in self.norms.items()}
        return self.kept.tree(streamed | self._masked().norms_by_leaf())

    def weighted_sum(self, weights: PyTree[Float[Array, " batch"]]) -> PyTree[Float[Array, "..."]]:
        """See `PerExampleGrads.weighted_sum`."""
        by_leaf = weights_by_leaf(weights, self.kept.layout.treedef, self.mask)
        # One pass: each streamed leaf receives the weights of its own group in its message.
        streamed = self.pull({leaf: select(self.mask, by_leaf[leaf]) for leaf in self.norms})
        return self.kept.tree(streamed | self._masked().sums_by_leaf(by_leaf))

    def stacked(self) -> PyTree[Float[Array, "batch ..."]]:
        """See `PerExampleGrads.stacked`. It takes one backward pass per example."""
        one_at_a_time = jnp.diag(self.mask.astype(jnp.float32))
        streamed = jax.lax.map(
            lambda weights: self.pull(dict.fromkeys(self.norms, weights)), one_at_a_time
        )
        return self._masked().stacked_tree(streamed)

    def _masked(self) -> FactoredGrads:
        """The other leaves under the mask of the whole, which a caller may have replaced."""
        return dataclasses.replace(self.kept, mask=self.mask)

    def parameter_specs(self) -> PyTree:
        """See `PerExampleGrads.parameter_specs`."""
        return self.kept.parameter_specs()


@jax.custom_jvp
def _without_derivatives(params: PyTree) -> PyTree:
    """Returns the parameters; a derivative of what is computed from them is refused."""
    return params


@_without_derivatives.defjvp
def _refuse_derivatives(primals: Any, tangents: Any) -> Any:
    # The two passes are differentiated already. JAX would return zeros for some primitives.
    raise ValueError(
        "expected per-example gradients that are not differentiated again; got a derivative of "
        'recomputed ones. Use per_example_grads(loss_fn, form="factored") inside jax.grad, '
        "jax.jvp and jax.hessian."
    )


def recomputed_grads(
    trace: LossTrace, params: PyTree, inputs: tuple[PyTree, ...], mask: Array
) -> tuple[Values, PerExampleGrads]:
    """Returns the values and the recomputed gradients of a batch."""
    streamed = streamed_leaves(trace.program, len(mask))
    if streamed:
        params = _without_derivatives(params)
    return streamed_grads(streamed, trace, params, inputs, mask)


def one_pass_grads(
    trace: LossTrace, params: PyTree, inputs: tuple[PyTree, ...], mask: Array
) -> tuple[Values, PerExampleGrads]:
    """Returns the values and the factored gradients of a batch."""
    return streamed_grads(held_in_scans(trace.program, len(mask)), trace, params, inputs, mask)


def streamed_grads(
    streamed: dict[int, StreamedLeaf],
    trace: LossTrace,
    params: PyTree,
    inputs: tuple[PyTree, ...],
    mask: Array,
) -> tuple[Values, PerExampleGrads]:
    """Returns the values and the gradients of a batch, with these leaves streamed."""
    if not streamed:
        return factored_grads(trace, params, inputs, mask)
    program, found = trace.program, trace.program.found
    in_backward_pass = {leaf.site.path: leaf for leaf in streamed.values()}
    kept = tuple(site for site in found.sites if site.path not in in_backward_pass)
    layout = Layout(program, len(mask), elsewhere=frozenset(streamed))
    leaves, flat_inputs, size = jax.tree.leaves(params), jax.tree.leaves(inputs), len(mask)

    readings = {i: zeros_of(leaf.readings, size, *_runs(leaf.site)) for i, leaf in streamed.items()}
    totals = {i: zeros_of(leaf.total, *_runs(leaf.site)) for i, leaf in streamed.items()}
    taps = {site.tap: zeros_of(tap_spec(site), size) for site in kept}
    # Leaves without a norm rule get one copy per example, so that each has its own gradient.
    copies = {
        leaf: jnp.broadcast_to(leaves[leaf], (size, *jnp.shape(leaves[leaf])))
        for leaf in found.fallback_reasons
    }
    runner = StreamRunner(kept, in_backward_pass, found.fallback_reasons)

    def loss(readings: Any, taps: Any, copies: Any, flat: Any, totals: Any) -> Any:
        zeros = {
            zeros_key(leaf.site): SiteZeros(readings[number], totals[number])
            for number, leaf in streamed.items()
        }
        values = [copies.get(i, leaf) for i, leaf in enumerate(leaves)]
        (value, aux), saved = run_with_taps(
            program.jaxpr, runner, trace.constants, values, flat, taps | zeros
        )
        messages = {
            number: jax.tree.unflatten(jax.tree.structure(leaf.message), saved.pop(leaf.site.path))
            for number, leaf in streamed.items()
        }
        return (value, messages), (aux, saved)

    def of_batch(readings: Any, taps: Any, copies: Any, totals: Any) -> Any:
        each = jax.vmap(loss, in_axes=(0, 0, 0, 0, None))
        return each(readings, taps, copies, flat_inputs, totals)

    (losses, messages), pull, (aux, saved) = jax.vjp(
        of_batch, readings, taps, copies, totals, has_aux=True
    )
    told = _tell(
        streamed, messages, {site.path: _no_cotangents(site, saved, size) for site in kept}
    )
    readings, cotangents, gradients, _ = pull((jnp.ones_like(losses), told))
    factors = {site.path: _factors_of(site, saved, cotangents) for site in kept}
    held = {i: leaf for i, leaf in streamed.items() if isinstance(leaf, HeldLeaf)}
    gradients |= {i: jax.vmap(leaf.to_leaf)(readings[i]) for i, leaf in held.items()}
    rest = hold(_without(streamed, factors), gradients, mask, layout)
    summed = {i: leaf for i, leaf in streamed.items() if i not in held}
    if not summed:
        return Values(losses, aux), rest
    norms = {i: _squared_norms(leaf, readings[i], factors) for i, leaf in summed.items()}
    messages = _tell(streamed, told, factors, readings)
    sums = functools.partial(_pull_sums, summed)
    return Values(losses, aux), RecomputedGrads(
        norms, jax.tree_util.Partial(sums, pull, losses, messages), rest, mask
    )


def _runs(site: Site) -> list[int]:
    return [scan.length for scan in site.scans]


def _no_cotangents(site: Site, saved: dict[EqnPath, Any], size: int) -> Factors:
    """Returns what is known of a site after the forward pass."""
    return Factors(saved[site.path], zeros_of(site.output, size, *_runs(site)))


def _tell(
    streamed: dict[int, StreamedLeaf],
    messages: dict[int, Message],
    factors: AllFactors,
    readings: dict[int, Any] | None = None,
) -> dict[int, Message]:
    """Returns the messages with what the first pass has found; without `readings` before it."""
    return {
        number: leaf.tell(
            messages[number],
            [factors[site.path] for site in leaf.kept],
            None if readings is None else readings[number],
        )
        for number, leaf in streamed.items()
    }


def _without(streamed: dict[int, StreamedLeaf], factors: AllFactors) -> AllFactors:
    """Returns the factors of the leaves that are not streamed."""
    others = {site.path for leaf in streamed.values() for site in leaf.kept}
    return {path: found for path, found in factors.items() if path not in others}


def _factors_of(site: Site, saved: dict[EqnPath, Any], cotangents: dict[EqnPath, Array]) -> Factors:
    window = jax.vmap(lambda leaf: cut(leaf, site.output_window))
    return Factors(saved[site.path], window(cotangents[site.tap]))


def _squared_norms(leaf: StreamedLeaf, readings: Any, factors: AllFactors) -> Array:
    return leaf.squared_norms(readings, [factors[site.path] for site in leaf.kept])


def _pull_sums(
    streamed: dict[int, StreamedLeaf],
    pull: Any,
    losses: Array,
    messages: dict[int, Message],
    weights: dict[int, Array],
) -> dict[int, Array]:
    # The weights enter where the sums are formed, not at the losses.
    def weigh(zeros: Array, weights: Array) -> Array:
        spread = weights.astype(zeros.dtype).reshape(-1, *[1] * (zeros.ndim - 1))
        return jnp.broadcast_to(spread, zeros.shape)

    weighed = {
        number: message._replace(weights=weigh(message.weights, weights[number]))
        for number, message in messages.items()
    }
    _, _, _, totals = pull((jnp.ones_like(losses), weighed))
    return {number: leaf.to_leaf(totals[number]) for number, leaf in streamed.items()}
