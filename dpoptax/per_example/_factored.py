"""The factored form: inputs and cotangents in place of per-example gradients.

For a product, a convolution or a lookup the gradient of example i is made of the input and the
cotangent of the output at each of its sites. Norms follow from the two by the rules in `rules/`;
a weighted sum is the ordinary gradient with scaled cotangents. `batch x params` numbers are never
held.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dpoptax._precision import widen
from dpoptax.per_example._base import PerExampleGrads, select
from dpoptax.per_example._norm_rules import Factors, NormRule, choose_rule, is_materialized
from dpoptax.per_example._stacked import StackedGrads, isolated
from dpoptax.per_example._tracing import find_sites as tracing
from dpoptax.per_example._tracing.concatenated import cut
from dpoptax.per_example._tracing.site import EqnPath, Site, tap_spec


class Layout:
    """What is static about factored gradients: the sites and rule of every leaf.

    Two layouts are equal if the loss traced alike, so that a compiled function is reused.
    """

    def __init__(self, found: tracing.Trace, params: PyTree, batch: int) -> None:
        leaves, self.treedef = jax.tree.flatten(params)
        self.specs = [jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)) for p in leaves]
        self.paths = [
            jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ]
        self.sites = found.sites
        self.reasons = found.stacked
        self.rules: dict[int, NormRule] = {}
        self.formed: set[int] = set()
        for leaf, spec in enumerate(self.specs):
            if leaf not in found.stacked:
                sites = self.sites_of(leaf)
                self.rules[leaf] = choose_rule(sites, spec)
                if is_materialized(self.rules[leaf], batch):
                    self.formed.add(leaf)
        self._signature = (str(found.jaxpr), self.treedef, batch)

    @classmethod
    def of(
        cls,
        loss_fn: Callable[..., Array],
        params: PyTree,
        inputs: tuple[PyTree, ...],
        batch: int,
    ) -> tuple["Layout", tracing.Trace]:
        """Traces the loss of one example; returns what is static, and the trace itself."""
        leaves, treedef = jax.tree.flatten(params)
        flat, input_treedef = jax.tree.flatten(inputs)

        def loss_of_leaves(leaves: list[Array], flat: list[Array]) -> Array:
            return loss_fn(
                jax.tree.unflatten(treedef, leaves), *jax.tree.unflatten(input_treedef, flat)
            )

        one = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in flat]
        found = tracing.trace(loss_of_leaves, leaves, one)
        return cls(found, params, batch), found

    def sites_of(self, leaf: int) -> list[Site]:
        """The sites of a leaf, in the order of the program."""
        return [site for site in self.sites if site.leaf == leaf]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self._signature == other._signature

    def __hash__(self) -> int:
        return hash(self._signature)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactoredGrads(PerExampleGrads):
    """Per-example gradients as factors, and stacked for the leaves that have none.

    Attributes:
        factors: by site, `Factors` with a leading example axis.
        plain: by leaf without sites, or cheaper to hold than its factors, `(batch, *leaf.shape)`.
        mask: bool `(batch,)`; True marks a real example.
        layout: what is static.
    """

    factors: dict[EqnPath, Factors]
    plain: dict[int, Array]
    mask: Array
    layout: Layout = dataclasses.field(metadata={"static": True})

    def squared_norms(self) -> PyTree[Float[Array, " batch"]]:
        """See `PerExampleGrads.squared_norms`."""
        norms = StackedGrads(self.plain, self.mask).squared_norms()
        for leaf, rule, factors in self._factored():
            norms[leaf] = select(self.mask, rule.squared_norms(factors))
        return self._tree(norms)

    def weighted_sum(self, weights: Float[Array, " batch"]) -> PyTree[Float[Array, "..."]]:
        """See `PerExampleGrads.weighted_sum`."""
        kept = self.mask & (weights != 0)
        sums = StackedGrads(self.plain, self.mask).weighted_sum(weights)
        for leaf, rule, factors in self._factored():
            scaled = [
                Factors(
                    tuple(select(kept, operand) for operand in operands),
                    select(kept, _scale(cotangent, weights)),
                )
                for operands, cotangent in factors
            ]
            sums[leaf] = rule.weighted_sum(scaled)
        return self._tree(sums)

    def stacked(self) -> PyTree[Float[Array, "batch ..."]]:
        """See `PerExampleGrads.stacked`."""
        leaves = StackedGrads(self.plain, self.mask).stacked()
        for leaf, rule, factors in self._factored():
            leaves[leaf] = select(self.mask, rule.gradients(factors))
        return self._tree(
            {i: leaf.astype(self.layout.specs[i].dtype) for i, leaf in leaves.items()}
        )

    def parameter_specs(self) -> PyTree:
        """See `PerExampleGrads.parameter_specs`."""
        return jax.tree.unflatten(self.layout.treedef, self.layout.specs)

    def _factored(self) -> Iterator[tuple[int, NormRule, list[Factors]]]:
        for leaf, rule in self.layout.rules.items():
            if leaf not in self.layout.formed:
                yield leaf, rule, [self.factors[site.path] for site in self.layout.sites_of(leaf)]

    def _tree(self, leaves: dict[int, Any]) -> PyTree:
        return jax.tree.unflatten(self.layout.treedef, [leaves[i] for i in range(len(leaves))])


def factored_grads(
    loss_fn: Callable[..., Array], params: PyTree, inputs: tuple[PyTree, ...], mask: Array
) -> tuple[Array, PerExampleGrads]:
    """Returns the losses and the factored gradients of a batch.

    Args:
        loss_fn: the scalar loss of one example, `loss_fn(params, *input)`.
        params: the parameters.
        inputs: the examples, and their keys where the loss draws, with a leading axis.
        mask: bool `(batch,)`.

    Returns:
        Losses `(batch,)` and `FactoredGrads`.
    """
    leaves, flat = jax.tree.leaves(params), jax.tree.leaves(inputs)
    layout, found = Layout.of(loss_fn, params, inputs, len(mask))
    taps = {
        site.tap: jnp.zeros(spec.shape, spec.dtype)
        for site in found.sites
        for spec in (tap_spec(site),)
    }
    plain = {leaf: leaves[leaf] for leaf in found.stacked}

    def of_example(flat: list[Array]) -> tuple[Array, dict[EqnPath, Factors], Any]:
        def loss(taps: Any, plain: dict[int, Array]) -> tuple[Array, Any]:
            values = [plain.get(i, leaf) for i, leaf in enumerate(leaves)]
            return tracing.run_with_taps(found, values, flat, taps)

        loss_value, pull, kept = jax.vjp(loss, taps, plain, has_aux=True)
        cotangents, gradients = pull(jnp.ones_like(loss_value))
        factors = {
            site.path: Factors(kept[site.path], cut(cotangents[site.tap], site.output_window))
            for site in found.sites
        }
        return loss_value, factors, gradients

    found_of_all = jax.vmap(of_example)(flat)
    if found.loose_convolution:
        found_of_all = isolated(of_example, found_of_all, flat, mask)
    losses, factors, gradients = found_of_all
    for leaf in sorted(layout.formed):
        of_leaf = [factors.pop(site.path) for site in layout.sites_of(leaf)]
        gradients[leaf] = layout.rules[leaf].gradients(of_leaf)
    return losses, FactoredGrads(factors, gradients, mask, layout)


def _scale(cotangent: Array, weights: Array) -> Array:
    wide = widen(cotangent)
    return wide * weights.astype(wide.dtype).reshape(-1, *[1] * (cotangent.ndim - 1))
