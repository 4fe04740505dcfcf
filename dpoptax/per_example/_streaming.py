"""Which leaves are streamed: treated while the backward pass runs, and how."""

import dataclasses
import math
from collections.abc import Sequence

import jax

from dpoptax import _jax_compat
from dpoptax.per_example._loss_trace import LossProgram
from dpoptax.per_example._norm_rules import NormRule, choose_rule
from dpoptax.per_example._streamed_leaf import HeldLeaf, OneRunLeaf, StreamedLeaf
from dpoptax.per_example._streamed_tied import tied_leaf
from dpoptax.per_example._tracing.site import Site

# A gradient is held instead of factors if it takes at most this part of their memory.
MAX_HELD_PART = 1 / 4


def streamed_leaves(program: LossProgram, batch: int) -> dict[int, StreamedLeaf]:
    """Returns the leaves that the recomputed form streams.

    If the gradients of all of them are small, as those of adapters are, then they are held. A
    second backward pass is not needed then.
    """
    found = {
        leaf: streamed
        for leaf, sites in _sites_by_leaf(program).items()
        if (streamed := _streamed_leaf(sites, program.param_specs[leaf])) is not None
    }
    held = _held_leaves(program, found)
    return held if len(held) == len(found) and _fits(program, held, batch) else found


def held_in_scans(program: LossProgram, batch: int) -> dict[int, StreamedLeaf]:
    """Returns the leaves whose gradients the factored form holds already in the backward pass.

    A scan would stack their factors. Outside of scans the compiler frees factors when it can.
    """
    found: dict[int, StreamedLeaf] = {
        leaf: OneRunLeaf(program.param_specs[leaf], sites[0], rule_of_one_run(sites[0]))
        for leaf, sites in _sites_by_leaf(program).items()
        if sites[0].scans and is_streamable(sites, program.param_specs[leaf])
    }
    held = _held_leaves(program, found)
    return held if _fits(program, held, batch) else {}


def _sites_by_leaf(program: LossProgram) -> dict[int, list[Site]]:
    # `vmap` could spread NaN from one example to others, and the remedy in `_stacked.py` needs
    # examples one at a time.
    if program.found.may_spread_nan:
        return {}
    by_leaf: dict[int, list[Site]] = {}
    for site in program.found.sites:
        by_leaf.setdefault(site.leaf, []).append(site)
    return by_leaf


def _held_leaves(
    program: LossProgram, streamed: dict[int, StreamedLeaf]
) -> dict[int, StreamedLeaf]:
    """Returns those of the leaves whose gradients are much smaller than their factors."""
    held: dict[int, StreamedLeaf] = {}
    for number, leaf in streamed.items():
        size = math.prod(leaf.spec.shape) * max(4, leaf.spec.dtype.itemsize)
        if isinstance(leaf, OneRunLeaf) and size <= MAX_HELD_PART * bytes_of(leaf.site):
            held[number] = HeldLeaf(leaf.spec, leaf.site, leaf.rule)
    return held


def _fits(program: LossProgram, held: dict[int, StreamedLeaf], batch: int) -> bool:
    """Whether the gradients of the batch are no more numbers than the whole model has."""
    variables, _ = _jax_compat.inputs_of(program.jaxpr)
    num_numbers = program.num_constants + len(program.param_specs)
    model = sum(math.prod(variable.aval.shape) for variable in variables[:num_numbers])
    return batch * sum(math.prod(leaf.spec.shape) for leaf in held.values()) <= model


def bytes_of(site: Site) -> float:
    """Returns the bytes of the factors of a site, for one example."""
    specs = (*site.operands, site.output)
    return site.num_runs * sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)


def is_streamable(sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> bool:
    """Whether each number of the leaf is used by one run of one equation.

    Then the squared norms of the runs add up to that of the leaf. A weight that is used twice, or
    shared by the steps of a scan, needs the factors of all its uses together. Under `vmap` a `cond`
    may give its parameters a batch axis, so its sites are left out.
    """
    (site, *others) = sites
    return (
        not others
        and not site.in_cond
        and all(scan.sliced for scan in site.scans)
        and site.output_window is None
        and site.preserves_norms(spec)
    )


def rule_of_one_run(site: Site) -> NormRule:
    """Returns the norm rule of one run of a site, as if the slice that it uses were the leaf."""
    alone = dataclasses.replace(site.equation, scans=(), steps=())
    return choose_rule([alone], site.parameter)


def _streamed_leaf(sites: list[Site], spec: jax.ShapeDtypeStruct) -> StreamedLeaf | None:
    """Returns how a leaf with these sites is streamed, or None if its factors must be kept."""
    if is_streamable(sites, spec):
        return OneRunLeaf(spec, sites[0], rule_of_one_run(sites[0]))
    return tied_leaf(sites, spec, choose_rule(sites, spec))


def why_kept(sites: Sequence[Site], *, spreads_nan: bool) -> str:
    """Says why the factors of a leaf with these sites are kept in the recomputed form."""
    if spreads_nan:
        return "vmap may spread NaN, so nothing is recomputed"
    if len(sites) > 1:
        return f"its {len(sites)} uses must be seen together"
    (site,) = sites
    if site.in_cond:
        return "used inside a cond"
    if not all(scan.sliced for scan in site.scans):
        return "the steps of a scan share it"
    return "only a part of it is used, or it is concatenated"
