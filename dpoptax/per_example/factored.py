"""The factored form: inputs and cotangents in place of per-example gradients.

For a product, a convolution or a lookup the gradient of example i is made of the input and the
cotangent of the output at each of its sites. Norms follow from the two by the rules in `rules/`;
a weighted sum is the ordinary gradient with scaled cotangents. `batch x params` numbers are never
held.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dpoptax.per_example import tracing
from dpoptax.per_example.form import PerExampleGrads
from dpoptax.per_example.rules import (
    Factors,
    Former,
    Rule,
    choose_former,
    choose_rule,
    leaf_gradient,
)
from dpoptax.per_example.stacked import StackedGrads, select


class Layout:
    """What is static about factored gradients: the sites and rule of every leaf.

    Two layouts are equal if the loss traced alike, so that a compiled function is reused.
    """

    def __init__(self, found: tracing.Trace, params: PyTree) -> None:
        leaves, self.treedef = jax.tree.flatten(params)
        self.specs = [jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)) for p in leaves]
        self.paths = [
            jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ]
        self.sites = found.sites
        self.reasons = found.stacked
        self.formers: dict[int, Former] = {}
        self.rules: dict[int, Rule] = {}
        for leaf, spec in enumerate(self.specs):
            if leaf in found.stacked:
                continue
            sites = self.sites_of(leaf)
            if (former := choose_former(sites, spec)) is not None:
                self.formers[leaf] = former
            else:
                self.rules[leaf] = choose_rule(sites, spec)
        self._signature = (str(found.jaxpr), self.treedef)

    def sites_of(self, leaf: int) -> list[tracing.Site]:
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

    factors: dict[tracing.Key, Factors]
    plain: dict[int, Array]
    mask: Array
    layout: Layout = dataclasses.field(metadata={"static": True})

    def squared_norms(self) -> PyTree[Float[Array, " batch"]]:
        """See `PerExampleGrads.squared_norms`."""
        norms = StackedGrads(self.plain, self.mask).squared_norms()
        for leaf, rule in self.layout.rules.items():
            norms[leaf] = select(self.mask, rule.squared_norms(self._factors_of(leaf)))
        return self._tree(norms)

    def weighted_sum(self, weights: Float[Array, " batch"]) -> PyTree[Float[Array, "..."]]:
        """See `PerExampleGrads.weighted_sum`."""
        kept = self.mask & (weights != 0)
        sums = StackedGrads(self.plain, self.mask).weighted_sum(weights)
        for leaf in self.layout.rules:
            scaled = [
                Factors(
                    tuple(select(kept, operand) for operand in operands),
                    select(kept, _scale(cotangent, weights)),
                )
                for operands, cotangent in self._factors_of(leaf)
            ]
            sums[leaf] = leaf_gradient(self.layout.sites_of(leaf), scaled, self.layout.specs[leaf])
        return self._tree(sums)

    def stacked(self) -> PyTree[Float[Array, "batch ..."]]:
        """See `PerExampleGrads.stacked`."""
        leaves = {
            leaf: gradient.astype(self.layout.specs[leaf].dtype)
            for leaf, gradient in StackedGrads(self.plain, self.mask).stacked().items()
        }
        for leaf in self.layout.rules:
            sites, spec = self.layout.sites_of(leaf), self.layout.specs[leaf]

            def one(example: list[Factors], sites=sites, spec=spec) -> Array:  # type: ignore[no-untyped-def]
                alone = jax.tree.map(lambda part: part[None], example)
                return leaf_gradient(sites, alone, spec).astype(spec.dtype)

            leaves[leaf] = select(self.mask, jax.vmap(one)(self._factors_of(leaf)))
        return self._tree(leaves)

    def parameter_specs(self) -> PyTree:
        """See `PerExampleGrads.parameter_specs`."""
        return jax.tree.unflatten(self.layout.treedef, self.layout.specs)

    def _factors_of(self, leaf: int) -> list[Factors]:
        return [self.factors[site.key] for site in self.layout.sites_of(leaf)]

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
    leaves, treedef = jax.tree.flatten(params)
    flat, input_treedef = jax.tree.flatten(inputs)

    def loss_of_leaves(leaves: list[Array], flat: list[Array]) -> Array:
        return loss_fn(
            jax.tree.unflatten(treedef, leaves), *jax.tree.unflatten(input_treedef, flat)
        )

    one = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in flat]
    found = tracing.trace(loss_of_leaves, leaves, one)
    layout = Layout(found, params)
    taps = {
        site.tap: jnp.zeros(spec.shape, spec.dtype)
        for site in found.sites
        for spec in (tracing.tap_spec(site),)
    }
    plain = {leaf: leaves[leaf] for leaf in found.stacked}

    def of_example(flat: list[Array]) -> tuple[Array, dict[tracing.Key, Factors], Any]:
        def loss(taps: Any, plain: dict[int, Array]) -> tuple[Array, Any]:
            values = [plain.get(i, leaf) for i, leaf in enumerate(leaves)]
            return tracing.run_with_taps(found, values, flat, taps)

        loss_value, pull, kept = jax.vjp(loss, taps, plain, has_aux=True)
        cotangents, gradients = pull(jnp.ones_like(loss_value))
        factors = {site.key: Factors(kept[site.key], cotangents[site.tap]) for site in found.sites}
        return loss_value, factors, gradients

    losses, factors, gradients = jax.vmap(of_example)(flat)
    for leaf, former in layout.formers.items():
        gradients[leaf] = former([factors.pop(site.key) for site in layout.sites_of(leaf)])
    return losses, FactoredGrads(factors, gradients, mask, layout)


def _scale(cotangent: Array, weights: Array) -> Array:
    wide = cotangent.astype(jnp.promote_types(cotangent.dtype, weights.dtype))
    return wide * weights.reshape(-1, *[1] * (cotangent.ndim - 1)).astype(wide.dtype)
