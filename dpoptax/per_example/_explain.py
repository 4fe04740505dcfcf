"""Explanation of per-example gradients: which form and norm rule each leaf takes, and why."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array

from dpoptax._explicit_axes import of_shapes
from dpoptax._masked_examples import unmasked
from dpoptax._pytree import PyTree
from dpoptax.per_example import _validate_loss as validation
from dpoptax.per_example._choose_form import FORMS, Choice, FormPlan, choose
from dpoptax.per_example._devices import current_device
from dpoptax.per_example._norm_rules import materialize
from dpoptax.per_example._streamed_leaf import HeldLeaf
from dpoptax.per_example._streaming import why_kept
from dpoptax.per_example._tracing.site import Site

HEADER = (
    "leaf",
    "shape",
    "form",
    "rule",
    "memory / stacked",
    "operations / stacked",
    "FLOP",
    "bytes",
    "why",
    "source",
)


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
        flops: estimated floating-point operations per example, in the forward and backward passes,
            for the norms and for the sum; NaN for a leaf without a rule.
        num_bytes: bytes per example that are held beyond a plain gradient.
        why: why the leaf takes this form.
        source: the lines of the loss that use the leaf.
    """

    leaf: str
    shape: tuple[int, ...]
    form: str
    rule: str
    memory: float
    operations: float
    flops: float
    num_bytes: float
    why: str
    source: str


class Explanation(tuple[LeafExplanation, ...]):
    """One `LeafExplanation` per leaf, in the order of the tree; prints as a table.

    Attributes:
        summary: the form of the batch, why, and for which device.
    """

    summary: str

    def __new__(cls, rows: Iterable[LeafExplanation], summary: str) -> "Explanation":
        """Returns the rows with the summary."""
        explanation = super().__new__(cls, rows)
        explanation.summary = summary
        return explanation

    def __str__(self) -> str:
        """Returns the table, and the summary below."""
        rows = [HEADER, *(_cells(row) for row in self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], self.summary])


@of_shapes
def explain(
    loss_fn: Callable[..., Array],
    params: PyTree,
    examples: PyTree,
    *,
    key: Any = None,
    form: str = "auto",
) -> Explanation:
    """Says which form and norm rule `per_example_grads` uses for each leaf, and why.

    It traces the loss of one example and computes nothing.

    Args:
        loss_fn: the loss of one example, as in `per_example_grads`.
        params: the parameters.
        examples: a batch, a tree of arrays `(batch, ...)`.
        key: a typed PRNG key, for a loss that takes one.
        form: as in `per_example_grads`. A leaf that the form does not serve is shown with the form
            that it takes instead.

    Returns:
        An `Explanation`: a tuple of `LeafExplanation` that prints as a table.

    Raises:
        TypeError: as in `per_example_grads`.
        ValueError: as in `per_example_grads`.

    Example:
        >>> import jax.numpy as jnp
        >>> loss_fn = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"]) / params["s"])
        >>> params = {"w": jnp.ones((300, 200)), "s": jnp.ones(200)}
        >>> s, w = explain(loss_fn, params, jnp.ones((128, 300)))
        >>> w.form, w.rule, f"{w.memory:.4f}"
        ('factored', 'outer', '0.0083')
        >>> s.form, s.rule
        ('stacked', 'used by div')
    """
    examples, _ = unmasked(examples)
    batch = len(validation.batch_mask(examples, None))
    validation.check_params(params)
    trace = validation.check_loss(loss_fn, params, examples, key, has_aux=None, allow_unused=True)
    program = trace.program
    if form == "auto":
        choice = choose(program, batch)
    elif form in FORMS:
        choice = Choice(form, None, "chosen by the caller")
    else:
        raise ValueError(f"form must be one of auto, {', '.join(FORMS)}; got {form!r}.")
    plan = FormPlan(program, choice.form, choice.microbatch_size or batch)
    rows = [_row(plan, program, leaf) for leaf in range(len(program.param_specs))]
    return Explanation(rows, _summary(choice, rows, batch))


def _summary(choice: Choice, rows: Sequence[LeafExplanation], batch: int) -> str:
    size = choice.microbatch_size
    parts = f", in microbatches of {size}" if size is not None else ""
    held = sum(row.num_bytes for row in rows) * (batch if size is None else size)
    return (
        f"form: {choice.form}{parts}: {choice.reason}. Held beyond a plain gradient: "
        f"{held / 2**20:.4g} MiB. Costs are those of: {current_device().kind}."
    )


def _row(plan: FormPlan, program: Any, leaf: int) -> LeafExplanation:
    layout, spec, cost = plan.layout, plan.specs[leaf], plan.cost(leaf)
    sites = layout.sites_of(leaf)
    # The relative columns compare with stacking: one gradient in memory, formed once.
    size = max(1, math.prod(spec.shape))
    formed = [site.equation for site in sites] if leaf in plan.streamed else sites
    forming = max(1.0, materialize.materialization_cost(formed, spec))
    num_floats: float = sum(site.num_floats for site in sites)
    source = _sources(sites) if sites else ""
    if leaf in layout.fallback_reasons:
        # A reason ends with the user's line, except where there is none.
        rule, _, source = layout.fallback_reasons[leaf].partition(" at ")
        form, num_floats, operations = "stacked", size, math.nan
        why = "no norm rule for this use"
    elif plan.form == "stacked":
        form, rule, num_floats, operations = "stacked", "direct", size, 1.0
        why = "the form of the batch"
    elif isinstance(plan.streamed.get(leaf), HeldLeaf):
        form, rule, num_floats, operations = (
            "materialized",
            plan.streamed[leaf].rule.name,
            size,
            1.0,
        )
        why = "much smaller than its factors"
    elif leaf in plan.streamed:
        found = plan.streamed[leaf]
        form, rule, operations = "recomputed", found.rule.name, found.cost / forming
        num_floats = sum(site.num_floats for site in found.kept)
        why = "its norm is read in the backward pass"
    elif leaf in layout.materialized:
        form, rule, num_floats, operations = "materialized", layout.rules[leaf].name, size, 1.0
        why = "cheaper to keep than to form twice"
    else:
        form, rule, operations = "factored", layout.rules[leaf].name, layout.rules[leaf].cost
        operations, why = operations / forming, "the norm rule with the least cost"
    if plan.form == "recomputed" and leaf in layout.rules:
        why = why_kept(sites, spreads_nan=program.found.may_spread_nan)
    return LeafExplanation(
        leaf=layout.paths[leaf] or "(the parameters)",
        shape=spec.shape,
        form=form,
        rule=rule,
        memory=num_floats / size,
        operations=operations,
        flops=cost.flops,
        num_bytes=cost.num_bytes,
        why=why,
        source=source,
    )


def _sources(sites: Sequence[Site]) -> str:
    sources = list(dict.fromkeys(site.source for site in sites))
    return sources[0] if len(sources) == 1 else f"{sources[0]} and {len(sources) - 1} more"


def _cells(row: LeafExplanation) -> tuple[str, ...]:
    def number(value: float) -> str:
        return "" if math.isnan(value) else f"{value:.3g}"

    shape = " x ".join(map(str, row.shape)) or "scalar"
    numbers = map(number, (row.memory, row.operations, row.flops, row.num_bytes))
    return row.leaf, shape, row.form, row.rule, *numbers, row.why, row.source
