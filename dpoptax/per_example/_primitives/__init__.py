"""Table of linear primitives. To add one, write its file and add one line here."""

from collections.abc import Iterable, Sequence
from typing import Any

from dpoptax import _jax_compat
from dpoptax.per_example._primitives.add import ADD
from dpoptax.per_example._primitives.base import LinearPrimitive as LinearPrimitive
from dpoptax.per_example._primitives.convolution import CONVOLUTION
from dpoptax.per_example._primitives.dot_general import DOT_GENERAL
from dpoptax.per_example._primitives.gather import GATHER
from dpoptax.per_example._primitives.mul import MUL
from dpoptax.per_example._primitives.ragged_dot import RAGGED_DOT

_TABLE = {
    entry.primitive: entry
    for entry in (
        DOT_GENERAL,
        CONVOLUTION,
        GATHER,
        ADD,
        MUL,
        RAGGED_DOT,
    )
}


def linear_primitive(primitive: Any) -> LinearPrimitive | None:
    """Returns the entry of a JAX primitive, or None if it is not in the table."""
    return _TABLE.get(primitive)


def linear_in(eqn: Any, position: int) -> LinearPrimitive | None:
    """Returns the entry of an equation that is linear in the operand at a position."""
    entry = linear_primitive(eqn.primitive)
    if entry is None or position not in entry.positions or not entry.accepts(eqn):
        return None
    return entry


def run_equation(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Runs one equation, so that `vmap` works where JAX has no rule, or so that it is fast."""
    entry = linear_primitive(eqn.primitive)
    if entry is not None and entry.run is not None and entry.accepts(eqn):
        return [entry.run(eqn, values)]
    return _jax_compat.bind(eqn, values)


def needs_own_run(equations: Iterable[Any]) -> bool:
    """Whether `run_equation` runs any of these equations in another way than JAX."""
    entries = (linear_primitive(eqn.primitive) for eqn in equations)
    return any(entry is not None and entry.run is not None for entry in entries)


def has_vmap_rules(equations: Iterable[Any]) -> bool:
    """Whether `vmap` works on all of these equations as they are."""
    entries = (linear_primitive(eqn.primitive) for eqn in equations)
    return all(entry is None or entry.has_vmap_rule for entry in entries)


def may_spread_nan(equations: Iterable[Any]) -> bool:
    """Whether `vmap` of these equations may spread NaN from one example to others."""
    entries = (linear_primitive(eqn.primitive) for eqn in equations)
    return any(entry is not None and entry.spreads_nan for entry in entries)
