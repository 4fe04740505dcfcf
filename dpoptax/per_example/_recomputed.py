"""Recomputed gradients: two backward passes instead of factors in memory ("ghost clipping").

The first backward pass computes the norms of the per-example gradients, layer by layer, and drops
the factors. The second one computes the weighted sum. Both start from one forward pass. The memory
is that of a plain step, also inside `jax.checkpoint` and `jax.lax.scan`, where factors would have
to be kept for all layers.

Leaves whose uses must be seen together, such as tied tables and weights shared over time, keep
their factors, and leaves without a norm rule keep their gradients, as in the factored form.

Li et al. 2022 (arXiv:2110.05679) and Bu et al. 2023 (arXiv:2210.00038) scale the losses in the
second pass. Here both passes compute the same cotangents, and the weights are multiplied in float32
or wider where the sum is formed. So a small weight is not rounded to 16 bits on its way through the
layers. XLA may still round narrow numbers at other places in the second pass than in the first, so
norms of a computation in 16 or 8 bits are increased by `narrow_margin`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dpoptax._precision import wide_dtype
from dpoptax.per_example._base import PerExampleGrads, Values, register_form, select
from dpoptax.per_example._factored import FactoredGrads, Layout, factored_grads, hold
from dpoptax.per_example._loss_trace import LossProgram, LossTrace
from dpoptax.per_example._norm_rules import Factors
from dpoptax.per_example._norm_rules.factors import to_leaf
from dpoptax.per_example._streamed_site import (
    SiteZeros,
    StreamRunner,
    is_streamable,
    rule_of_one_run,
    zeros_key,
)
from dpoptax.per_example._tracing.concatenated import cut
from dpoptax.per_example._tracing.find_sites import run_with_taps
from dpoptax.per_example._tracing.site import EqnPath, Site, tap_spec

# Added to the squared norms, in units of them, if the layers compute in 16 bits: 1.6 % of the norm.
# On a CPU the two passes differed by up to .005 % of the norm in bfloat16. Nothing bounds what a
# compiler does, so this allows for 300 times as much.
NARROW_MARGIN = 1 / 32

# The same in 8 bits, where a rounding is up to 32 times as coarse as in bfloat16: 41 % of the norm.
EIGHT_BIT_MARGIN = 32 * NARROW_MARGIN


@register_form
@dataclasses.dataclass(frozen=True, repr=False)
class RecomputedGrads(PerExampleGrads):
    """Per-example gradients as norms, and a function that runs the backward pass again.

    Attributes:
        norms: by leaf, the squared norms `(batch,)` of streamed leaves.
        pull: from the weights of the examples to the sums of the streamed leaves.
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

    def weighted_sum(self, weights: Float[Array, " batch"]) -> PyTree[Float[Array, "..."]]:
        """See `PerExampleGrads.weighted_sum`."""
        streamed = self.pull(select(self.mask, weights))
        return self.kept.tree(streamed | self._masked().sums_by_leaf(weights))

    def stacked(self) -> PyTree[Float[Array, "batch ..."]]:
        """See `PerExampleGrads.stacked`. It takes one backward pass per example."""
        one_at_a_time = jnp.diag(self.mask.astype(jnp.float32))
        streamed = jax.lax.map(self.pull, one_at_a_time)
        return self._masked().stacked_tree(streamed)

    def _masked(self) -> FactoredGrads:
        """The other leaves under the mask of the whole, which a caller may have replaced."""
        return dataclasses.replace(self.kept, mask=self.mask)

    def parameter_specs(self) -> PyTree:
        """See `PerExampleGrads.parameter_specs`."""
        return self.kept.parameter_specs()


def streamed_sites(program: LossProgram) -> dict[int, Site]:
    """Returns, by leaf, the sites whose norms are computed during the backward pass."""
    # `vmap` could spread NaN from one example to others, and the remedy in `_stacked.py` needs
    # examples one at a time.
    if program.found.may_spread_nan:
        return {}
    by_leaf: dict[int, list[Site]] = {}
    for site in program.found.sites:
        by_leaf.setdefault(site.leaf, []).append(site)
    return {
        leaf: sites[0]
        for leaf, sites in by_leaf.items()
        if is_streamable(sites, program.param_specs[leaf])
    }


def recomputed_grads(
    trace: LossTrace, params: PyTree, inputs: tuple[PyTree, ...], mask: Array
) -> tuple[Values, PerExampleGrads]:
    """Returns the values and the recomputed gradients of a batch."""
    program, found = trace.program, trace.program.found
    streamed = streamed_sites(program)
    if not streamed:
        return factored_grads(trace, params, inputs, mask)
    rules = {site.path: (site, rule_of_one_run(site)) for site in streamed.values()}
    kept = tuple(site for site in found.sites if site.leaf not in streamed)
    layout = Layout(program, len(mask), elsewhere=frozenset(streamed))
    leaves, flat_inputs = jax.tree.leaves(params), jax.tree.leaves(inputs)
    size = len(mask)

    norm_zeros, sum_zeros = {}, {}
    for leaf, site in streamed.items():
        runs, dtype = [scan.length for scan in site.scans], wide_dtype(layout.specs[leaf].dtype)
        norm_zeros[leaf] = jnp.zeros((size, *runs), dtype)
        sum_zeros[leaf] = jnp.zeros((*runs, *site.parameter.shape), dtype)
    taps = {
        site.tap: jnp.zeros((size, *spec.shape), spec.dtype)
        for site in kept
        for spec in (tap_spec(site),)
    }
    # Leaves without a norm rule get one copy per example, so that each has its own gradient.
    copies = {
        leaf: jnp.broadcast_to(leaves[leaf], (size, *jnp.shape(leaves[leaf])))
        for leaf in found.fallback_reasons
    }
    runner = StreamRunner(kept, rules, found.fallback_reasons)

    def loss(norms: Any, taps: Any, copies: Any, flat: Any, sums: Any) -> Any:
        zeros = {
            zeros_key(site): SiteZeros(norms[leaf], sums[leaf]) for leaf, site in streamed.items()
        }
        values = [copies.get(i, leaf) for i, leaf in enumerate(leaves)]
        (value, aux), saved = run_with_taps(
            program.jaxpr, runner, trace.constants, values, flat, taps | zeros
        )
        weights = {leaf: saved.pop(site.path)[0] for leaf, site in streamed.items()}
        return (value, weights), (aux, saved)

    def of_batch(norms: Any, taps: Any, copies: Any, sums: Any) -> Any:
        each = jax.vmap(loss, in_axes=(0, 0, 0, 0, None))
        return each(norms, taps, copies, flat_inputs, sums)

    (losses, zeros), pull, (aux, saved) = jax.vjp(
        of_batch, norm_zeros, taps, copies, sum_zeros, has_aux=True
    )
    norms, cotangents, gradients, _ = pull((jnp.ones_like(losses), zeros))
    factors = {site.path: _factors_of(site, saved, cotangents) for site in kept}
    grads = RecomputedGrads(
        norms={
            leaf: _norm_of_runs(streamed[leaf], norm, bits=program.fewest_bits)
            for leaf, norm in norms.items()
        },
        pull=jax.tree_util.Partial(
            functools.partial(_pull_sums, streamed, program.param_specs), pull, losses, zeros
        ),
        kept=hold(factors, gradients, mask, layout),
        mask=mask,
    )
    return Values(losses, aux), grads


def _factors_of(site: Site, saved: dict[EqnPath, Any], cotangents: dict[EqnPath, Array]) -> Factors:
    window = jax.vmap(lambda leaf: cut(leaf, site.output_window))
    return Factors(saved[site.path], window(cotangents[site.tap]))


def _norm_of_runs(site: Site, norms: Array, *, bits: int) -> Array:
    """Adds up the squared norms of the runs of a site, `(batch, *scans)`, rounded up."""
    total = norms.sum(axis=tuple(range(1, norms.ndim)))
    margin = 4 * site.num_runs * float(jnp.finfo(total.dtype).eps)
    return total * (1 + margin + narrow_margin(bits))


def narrow_margin(bits: int) -> float:
    """What is added to squared norms, in units of them, if the layers compute in so few bits."""
    if bits >= 32:
        return 0.0
    return NARROW_MARGIN if bits >= 16 else EIGHT_BIT_MARGIN


def _pull_sums(
    streamed: dict[int, Site], specs: Any, pull: Any, losses: Array, zeros: Any, weights: Array
) -> dict[int, Array]:
    # The cotangents are those of the first pass: the weights enter where the sums are formed.
    spread = jax.tree.map(
        lambda zero: jnp.broadcast_to(
            weights.astype(zero.dtype).reshape(-1, *[1] * (zero.ndim - 1)), zero.shape
        ),
        zeros,
    )
    _, _, _, sums = pull((jnp.ones_like(losses), spread))
    return {leaf: to_leaf(site, sums[leaf], specs[leaf]) for leaf, site in streamed.items()}
