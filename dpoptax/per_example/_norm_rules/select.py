"""The table of norm rules, and the choice of the cheapest for a leaf.

Shapes are static, so the choice is made once, when the loss is traced.
"""

import math
from collections.abc import Sequence

import jax

from dpoptax.per_example._norm_rules import cost_model
from dpoptax.per_example._norm_rules.base import NormRule
from dpoptax.per_example._norm_rules.convolution import ConvolutionPatches, ConvolutionPixelGram
from dpoptax.per_example._norm_rules.embedding import EmbeddingLookup
from dpoptax.per_example._norm_rules.materialize import Materialize
from dpoptax.per_example._norm_rules.matmul import DirectMatmul, GramMatmul, OuterProduct
from dpoptax.per_example._norm_rules.ragged_dot import DirectRagged, GramRagged
from dpoptax.per_example._norm_rules.scale import ElementwiseScale
from dpoptax.per_example._norm_rules.tied_embedding import TiedEmbedding
from dpoptax.per_example._tracing.site import Site

# To add a rule, write its file and add one line here. Of equally cheap rules the first is used.
RULES: tuple[type[NormRule], ...] = (
    OuterProduct,
    DirectMatmul,
    GramMatmul,
    EmbeddingLookup,
    TiedEmbedding,
    ElementwiseScale,
    DirectRagged,
    GramRagged,
    ConvolutionPatches,
    ConvolutionPixelGram,
    Materialize,
)


def choose_rule(sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> NormRule:
    """Returns the cheapest rule that matches all uses of a leaf; `Materialize` always does."""
    candidates = [rule for rule in (kind.matches(sites, spec) for kind in RULES) if rule]
    return min(candidates, key=lambda rule: rule.cost)


def is_materialized(rule: NormRule, batch: int) -> bool:
    """Whether a leaf is better held as per-example gradients than as factors.

    The gradients are then computed once, and serve both the norms and the sum. That is worth it if
    all three hold: they are not much larger than the factors, those of the batch are not too large,
    and reading and writing them costs less than the norms from factors.
    """
    costs = cost_model.constants(rule.sites)
    size = math.prod(rule.spec.shape)
    factors = sum(site.num_floats for site in rule.sites)
    return (
        size <= costs.max_held_ratio * factors
        and size * batch < costs.max_held_floats
        and size * costs.held < rule.cost
    )
