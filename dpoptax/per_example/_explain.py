"""Explanation of per-example gradients: which form and norm rule each leaf takes, and why."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, PyTree

from dpoptax._masked_examples import unmasked
from dpoptax.per_example import _validate_loss as validation
from dpoptax.per_example._choose_form import is_recomputed
from dpoptax.per_example._factored import Layout
from dpoptax.per_example._norm_rules import materialize
from dpoptax.per_example._recomputed import streamed_sites
from dpoptax.per_example._small_gradients import are_small
from dpoptax.per_example._streamed_site import rule_of_one_run
from dpoptax.per_example._tracing.site import Site

HEADER = ("leaf", "shape", "form", "rule", "memory / stacked", "operations / stacked", "source")


class LeafExplanation(NamedTuple):
    """How one leaf of the parameters is treated.

    Attributes:
        leaf: its path.
        shape: its shape.
        form: `factored`: inputs and cotangents are in memory. `materialized`: the gradient of every
            example is computed from them once and kept. `recomputed`: only norms are kept, and the
            backward pass runs twice. `stacked`: plain differentiation of every example.
        rule: how norms follow from the factors. For a stacked leaf, why it is stacked.
        memory: numbers in memory per example, divided by the size of the leaf.
        operations: multiplications per example for the norms, divided by those that form the
            gradient; NaN for a stacked leaf.
        source: the lines of the loss that use the leaf.
    """

    leaf: str
    shape: tuple[int, ...]
    form: str
    rule: str
    memory: float
    operations: float
    source: str


class Explanation(tuple[LeafExplanation, ...]):
    """One `LeafExplanation` per leaf, in the order of the tree; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        """Returns the table."""
        rows = [HEADER, *(_cells(row) for row in self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def explain(
    loss_fn: Callable[..., Array], params: PyTree, examples: PyTree, *, key: Any = None
) -> Explanation:
    """Says which form and norm rule `per_example_grads` uses for each leaf, and why.

    It traces the loss of one example and computes nothing.

    Args:
        loss_fn: the loss of one example, as in `per_example_grads`.
        params: the parameters.
        examples: a batch, a tree of arrays `(batch, ...)`.
        key: a typed PRNG key, for a loss that takes one.

    Returns:
        An `Explanation`: a tuple of `LeafExplanation` that prints as a table.

    Raises:
        TypeError: as in `per_example_grads`.
        ValueError: as in `per_example_grads`.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"]) * params["s"])
        >>> params = {"w": jnp.ones((300, 200)), "s": jnp.ones(200)}
        >>> s, w = explain(loss_fn, params, jnp.ones((128, 300)))
        >>> w.form, w.rule, f"{w.memory:.4f}"
        ('factored', 'outer', '0.0083')
        >>> s.form, s.rule
        ('stacked', 'used by mul')
    """
    examples, _ = unmasked(examples)
    batch = len(validation.batch_mask(examples, None))
    validation.check_params(params)
    trace = validation.check_loss(loss_fn, params, examples, key, has_aux=None, allow_unused=True)
    program = trace.program
    streamed = streamed_sites(program) if is_recomputed(program) else {}
    layout = Layout(program, batch, elsewhere=frozenset(streamed))
    rows = _rows(layout, streamed)
    return Explanation(map(_as_stacked, rows) if are_small(program) else rows)


def _as_stacked(row: LeafExplanation) -> LeafExplanation:
    """The row of a leaf whose gradients are stacked because they are small."""
    if row.form == "stacked":
        return row
    return row._replace(form="stacked", rule="smaller than factors", memory=1.0, operations=1.0)


def _rows(layout: Layout, streamed: dict[int, Site]) -> Iterator[LeafExplanation]:
    for leaf, (path, spec) in enumerate(zip(layout.paths, layout.specs, strict=True)):
        name = path or "(the parameters)"
        if leaf in layout.fallback_reasons:
            # A reason ends with the user's line, except where there is none.
            reason, _, source = layout.fallback_reasons[leaf].partition(" at ")
            yield LeafExplanation(name, spec.shape, "stacked", reason, 1.0, math.nan, source)
            continue
        if leaf in streamed:
            site = streamed[leaf]
            rule = rule_of_one_run(site)
            forming = max(1.0, materialize.materialization_cost([site], spec))
            operations = site.num_runs * rule.cost / forming
            yield LeafExplanation(
                name, spec.shape, "recomputed", rule.name, 0.0, operations, site.source
            )
            continue
        sites, rule = layout.sites_of(leaf), layout.rules[leaf]
        # Both columns compare with stacking: one gradient in memory, formed once.
        size = max(1, math.prod(spec.shape))
        materialized = leaf in layout.materialized
        num_floats = size if materialized else sum(site.num_floats for site in sites)
        forming = max(1.0, materialize.materialization_cost(sites, spec))
        yield LeafExplanation(
            leaf=name,
            shape=spec.shape,
            form="materialized" if materialized else "factored",
            rule=rule.name,
            memory=num_floats / size,
            operations=1.0 if materialized else rule.cost / forming,
            source=_sources(sites),
        )


def _sources(sites: Sequence[Site]) -> str:
    sources = list(dict.fromkeys(site.source for site in sites))
    return sources[0] if len(sources) == 1 else f"{sources[0]} and {len(sources) - 1} more"


def _cells(row: LeafExplanation) -> tuple[str, ...]:
    operations = "" if math.isnan(row.operations) else f"{row.operations:.3g}"
    shape = " x ".join(map(str, row.shape)) or "scalar"
    return row.leaf, shape, row.form, row.rule, f"{row.memory:.3g}", operations, row.source
