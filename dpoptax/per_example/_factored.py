"""Factored gradients: inputs and output cotangents instead of per-example gradients.

The gradient of a product, a convolution or a lookup consists of two factors: the input, and the
cotangent of the output. Norms follow from the factors by the rules in `_norm_rules`. A weighted sum
is the ordinary gradient with scaled cotangents. So the `batch x params` numbers of the stacked form
are never in memory.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax._pytree import PyTree
from dpoptax.per_example._base import PerExampleGrads, Values, register_form, select
from dpoptax.per_example._devices import current_device
from dpoptax.per_example._leaf_weights import kept_by_leaf, weights_by_leaf
from dpoptax.per_example._loss_trace import LossProgram, LossTrace
from dpoptax.per_example._norm_rules import (
    Factors,
    NormRule,
    choose_rule,
    is_materialized,
    sum_weighted,
)
from dpoptax.per_example._stacked import StackedGrads, each_example
from dpoptax.per_example._tracing.concatenated import cut
from dpoptax.per_example._tracing.find_sites import run_with_taps
from dpoptax.per_example._tracing.site import EqnPath, Site, tap_spec
from dpoptax.per_example._tracing.visitors import TapRunner


class Layout:
    """The static part of factored gradients: the sites and the norm rule of every leaf.

    Leaves in `elsewhere` are handled by another form, and have no rule here.

    Two layouts are equal if their losses have the same jaxpr, so that JAX reuses a compiled
    function.

    Attributes:
        specs: shape and dtype of each leaf.
        paths: the name of each leaf.
        sites: of all leaves.
        fallback_reasons: by leaf, why it has no norm rule and takes plain differentiation.
        rules: by leaf, for the others.
        materialized: the leaves with a rule of which it is cheaper to hold the gradients.
    """

    def __init__(
        self, program: LossProgram, batch: int, elsewhere: frozenset[int] = frozenset()
    ) -> None:
        self.treedef = program.params_treedef
        self.specs = program.param_specs
        self.paths = program.param_paths
        self.sites = program.found.sites
        self.fallback_reasons = program.found.fallback_reasons
        self.rules: dict[int, NormRule] = {}
        self.materialized: set[int] = set()
        for leaf, spec in enumerate(self.specs):
            if leaf not in self.fallback_reasons and leaf not in elsewhere:
                sites = self.sites_of(leaf)
                self.rules[leaf] = choose_rule(sites, spec)
                if is_materialized(self.rules[leaf], batch):
                    self.materialized.add(leaf)
        # Batch size and device take part: they decide on rules, and which leaves are materialized.
        self._signature = (*program.signature, batch, elsewhere, current_device())

    def sites_of(self, leaf: int) -> list[Site]:
        """The sites of a leaf, in the order of the program."""
        return [site for site in self.sites if site.leaf == leaf]

    def prepare(self, factors: dict[EqnPath, Factors]) -> dict[EqnPath, Factors]:
        """Returns the factors in the form that the rules of their leaves take."""
        prepared = dict(factors)
        for leaf, rule in self.rules.items():
            if leaf not in self.materialized:
                paths = [site.path for site in self.sites_of(leaf)]
                found = rule.prepare([factors[path] for path in paths])
                prepared |= dict(zip(paths, found, strict=True))
        return prepared

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self._signature == other._signature

    def __hash__(self) -> int:
        return hash(self._signature)


@register_form
@dataclasses.dataclass(frozen=True, repr=False)
class FactoredGrads(PerExampleGrads):
    """Per-example gradients as factors, or as arrays for leaves where factors do not pay.

    Attributes:
        factors: by site, `Factors` with a leading example axis.
        materialized: by leaf, gradients `(batch, *leaf.shape)`: of leaves without a norm rule, and
            of leaves whose gradients are cheaper to hold than to form twice.
        mask: bool `(batch,)`; True marks a real example.
        layout: the static part.
    """

    factors: dict[EqnPath, Factors]
    materialized: dict[int, Array]
    mask: Array
    layout: Layout = dataclasses.field(metadata={"static": True})

    def squared_norms(self) -> PyTree[Float[Array, " batch"]]:
        """See `PerExampleGrads.squared_norms`."""
        return self.tree(self.norms_by_leaf())

    def norms_by_leaf(self) -> dict[int, Array]:
        """Returns the squared norms by the number of the leaf."""
        norms = StackedGrads(self.materialized, self.mask).squared_norms()
        for leaf, rule, factors in self._factored_leaves():
            norms[leaf] = select(self.mask, rule.squared_norms(factors))
        return norms

    def weighted_sum(self, weights: PyTree[Float[Array, " batch"]]) -> PyTree[Float[Array, "..."]]:
        """See `PerExampleGrads.weighted_sum`."""
        return self.tree(
            self.sums_by_leaf(weights_by_leaf(weights, self.layout.treedef, self.mask))
        )

    def sums_by_leaf(self, weights: list[Array]) -> dict[int, Array]:
        """Returns the weighted sums by the number of the leaf, from the weights of all leaves."""
        kept = kept_by_leaf(weights, self.mask)
        of_materialized = {leaf: weights[leaf] for leaf in self.materialized}
        sums = StackedGrads(self.materialized, self.mask).weighted_sum(of_materialized)
        for leaf, rule, factors in self._factored_leaves():
            sums[leaf] = sum_weighted(rule, factors, weights[leaf], kept[leaf])
        return sums

    def stacked(self) -> PyTree[Float[Array, "batch ..."]]:
        """See `PerExampleGrads.stacked`."""
        return self.stacked_tree({})

    def stacked_tree(self, others: dict[int, Array]) -> PyTree[Float[Array, "batch ..."]]:
        """Returns the stacked gradients, those of leaves that another form handles included."""
        leaves = StackedGrads(self.materialized, self.mask).stacked()
        for leaf, rule, factors in self._factored_leaves():
            leaves[leaf] = select(self.mask, rule.gradients(factors))
        leaves |= others
        return self.tree({i: leaf.astype(self.layout.specs[i].dtype) for i, leaf in leaves.items()})

    def parameter_specs(self) -> PyTree:
        """See `PerExampleGrads.parameter_specs`."""
        return jax.tree.unflatten(self.layout.treedef, self.layout.specs)

    def _factored_leaves(self) -> Iterator[tuple[int, NormRule, list[Factors]]]:
        for leaf, rule in self.layout.rules.items():
            if leaf not in self.layout.materialized:
                yield leaf, rule, [self.factors[site.path] for site in self.layout.sites_of(leaf)]

    def tree(self, leaves: dict[int, Any]) -> PyTree:
        """Returns the tree of values that are given by the number of the leaf."""
        return jax.tree.unflatten(self.layout.treedef, [leaves[i] for i in range(len(leaves))])


def factored_grads(
    trace: LossTrace, params: PyTree, inputs: tuple[PyTree, ...], mask: Array
) -> tuple[Values, PerExampleGrads]:
    """Returns the values and the factored gradients of a batch."""
    program, found = trace.program, trace.program.found
    layout = Layout(program, len(mask))
    leaves, flat_inputs = jax.tree.leaves(params), jax.tree.leaves(inputs)
    # Sites that share a tap share one array. Its values are never read, so XLA removes it.
    taps = {
        site.tap: jnp.zeros(spec.shape, spec.dtype)
        for site in found.sites
        for spec in (tap_spec(site),)
    }
    fallback = {leaf: leaves[leaf] for leaf in found.fallback_reasons}
    runner = TapRunner(found.sites, found.fallback_reasons)

    def of_example(flat: list[Array]) -> tuple[Any, list[Array]]:
        # One backward pass gives the cotangents at all sites and the gradients of the other leaves.
        # Leaves with sites are constants: their gradients are never formed here.
        def loss(taps: Any, fallback: dict[int, Array]) -> tuple[Array, Any]:
            values = [fallback.get(i, leaf) for i, leaf in enumerate(leaves)]
            (value, aux), saved = run_with_taps(
                program.jaxpr, runner, trace.constants, values, flat, taps
            )
            return value, (aux, saved)

        loss_value, pull, (aux, saved) = jax.vjp(loss, taps, fallback, has_aux=True)
        cotangents, gradients = pull(jnp.ones_like(loss_value))
        factors = {
            site.path: Factors(saved[site.path], cut(cotangents[site.tap], site.output_window))
            for site in found.sites
        }
        return (loss_value, factors, gradients), aux

    if found.may_spread_nan and len(mask):
        results = each_example(of_example, flat_inputs, mask)
    else:
        results = jax.vmap(of_example)(flat_inputs)
    (losses, factors, gradients), aux = results
    return Values(losses, aux), hold(factors, gradients, mask, layout)


def hold(
    factors: dict[EqnPath, Factors], gradients: dict[int, Array], mask: Array, layout: Layout
) -> FactoredGrads:
    """Returns factored gradients, with those leaves materialized that the layout says."""
    factors, gradients = dict(factors), dict(gradients)
    # Sorted, so that equal layouts give equal programs.
    for leaf in sorted(layout.materialized):
        of_leaf = [factors.pop(site.path) for site in layout.sites_of(leaf)]
        rule = layout.rules[leaf]
        gradients[leaf] = rule.gradients(rule.prepare(of_leaf))
    return FactoredGrads(layout.prepare(factors), gradients, mask, layout)
